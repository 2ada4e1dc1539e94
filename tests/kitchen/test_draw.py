import itertools
import json
import random
import re
import xml.etree.ElementTree as ET
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest

from crucible.kitchen import (
    async_loop,
    compile,
    ensure,
    every,
    fuse,
    parallel,
    programs,
    repeat,
    retry,
    sequence,
    stage,
    stream,
    timeout,
    when,
)
from crucible.kitchen.draw import draw, save
from crucible.kitchen.outline import describe
from crucible.kitchen.svg import GREY, INK
from crucible.kitchen.wiring import leaves


@stage("batch", host=True)
def next_batch(data, step):
    """The batch of a step.

    And more.
    """


@stage("grads", "metrics")
def forward_backward(state, batch):
    pass


@stage("state")
def optim_step(state, grads):
    pass


@stage(host=True)
def log_metrics(metrics, step, unknown=None):
    pass


@stage("state")
def init_state(key):
    pass


def training(chunk=1):
    body = (next_batch, forward_backward, optim_step, log_metrics)
    return compile(sequence(init_state, repeat(8, *body, chunk=chunk)))


class Rect(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def within(self, other):
        inside = self.left > other.left and self.top > other.top
        return inside and self.right < other.right and self.bottom < other.bottom

    def overlaps(self, other):
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.bottom <= other.top or other.bottom <= self.top)


class Drawn(NamedTuple):
    """A box or a text of a picture, where it is, and the indices of the boxes that it is in."""

    role: str
    text: str
    rect: Rect
    boxes: tuple[int, ...]


def read(svg):
    """All boxes and texts of a picture."""
    drawn = []

    def walk(element, x, y, boxes):
        kind = element.tag.partition("}")[2]
        if found := re.fullmatch(r"translate\((\S+) (\S+)\)", element.get("transform", "")):
            x, y = x + float(found[1]), y + float(found[2])
        number = {k: float(v) for k, v in element.items() if re.fullmatch(r"-?[\d.]+", v)}
        if kind == "text":
            text, size = "".join(element.itertext()), number["font-size"]
            wide = sum(1 + (c >= "\u3000") for c in text) * size * 0.605
            left = x + number["x"] - (wide / 2 if element.get("text-anchor") == "middle" else 0)
            base = y + number["y"]
            rect = Rect(left, base - 0.76 * size, left + wide, base + 0.24 * size)
            drawn.append(Drawn(element.get("class"), text, rect, boxes))
        if "box" in element.get("class", "").split():
            shape = next(child for child in element if child.tag.endswith("rect"))
            x_of, y_of, width, height = (
                float(shape.get(k, 0)) for k in ("x", "y", "width", "height")
            )
            rect = Rect(x + x_of, y + y_of, x + x_of + width, y + y_of + height)
            drawn.append(Drawn(element.get("class"), "", rect, boxes))
            boxes = (*boxes, len(drawn) - 1)
        for child in element:
            walk(child, x, y, boxes)

    root = ET.fromstring(svg)
    walk(root, 0.0, 0.0, ())
    page = Rect(0, 0, float(root.get("width", 0)), float(root.get("height", 0)))
    return page, drawn


def texts(svg, role):
    return [d.text for d in read(svg)[1] if d.role == role]


def assert_neat(svg):
    """Every text and box is within the box around it, and clear of all others."""
    page, drawn = read(svg)
    for i, one in enumerate(drawn):
        around = drawn[one.boxes[-1]].rect if one.boxes else page
        assert one.rect.within(around), f"{one} is not within {around}"
        for j, other in enumerate(drawn[:i]):
            if j not in one.boxes:
                assert not one.rect.overlaps(other.rect), f"{one} overlaps {other}"


def generated(seed, depth=4):
    """Any workflow, of all combinators, with names of all lengths."""
    choose, count = random.Random(seed), itertools.count()
    values = ["state", "batch", "x"]

    def name():
        letters = choose.choice(["a", "long_name_", "very_very_long_name_of_a_slot_", "数据"])
        return f"{letters * choose.randint(1, 2)}{next(count)}"

    def leaf(host):
        gives = [name() for _ in range(choose.choice([0, 1, 1, 2, 9]))]
        reads = choose.sample(values, min(len(values), choose.choice([0, 1, 2, 3, 9])))
        options = choose.sample(values, 1)
        parameters = reads + [f"{n}=None" for n in options if n not in reads]
        function = eval(f"lambda {', '.join(parameters)}: None")
        function.__name__ = name()
        values.extend(gives)
        return stage(*gives, host=host)(function)

    def some(level, host):
        return [workflow(level - 1, host) for _ in range(choose.randint(1, 3))]

    def loop(level, host):
        number, state = name(), name()
        values.append(state)
        carry = stage(state, host=host)(eval(f"lambda {state}, {number}: 0"))
        return repeat(choose.randint(1, 9), *some(level, host), carry, index=number)

    def queue(level, host):
        number, age, item, stop = name(), name(), name(), name()
        give = stage(item, host=True)(eval(f"lambda {age}, {choose.choice(values)}: 0"))
        until = eval(f"lambda {stop}: 0")
        body = some(level, host)
        return async_loop(give, *body, stop_when=until, index=number, version=age)

    def workflow(level, host=None):
        touches = choose.random() < 0.4 if host is None else host
        if level == 0:
            return leaf(touches)
        make = choose.randrange(11)
        body = some(level, True if make in (7, 8) else host)
        other = workflow(level - 1, host)
        match make:
            case 0:
                return loop(level, host)
            case 1:
                return every(choose.randint(0, 20), *body, index="x")
            case 2:
                return when(lambda state, x: 1, *body, otherwise=choose.choice([other, None]))
            case 3:
                return when(choose.choice([True, False]), *body, otherwise=other)
            case 4:
                return parallel(*body)
            case 5:
                return queue(level, host)
            case 6:
                return ensure(sequence(*body), other)
            case 7:
                return retry(body[0], attempts=choose.randint(1, 9))
            case 8:
                return timeout(body[0], 3.5)
            case 9:
                return stream(lambda batch: [], *body, item=name(), index=name())
            case _:
                return fuse(leaf(False), leaf(False)) if host is not True else sequence(*body)

    return sequence(*(workflow(depth) for _ in range(2)))


SAMPLES = [generated(seed) for seed in range(40)] + [training(), training(4), init_state]


@pytest.mark.parametrize("number", range(len(SAMPLES)))
@pytest.mark.parametrize("change", [lambda w: w, compile], ids=["plain", "compiled"])
def test_texts_and_boxes_lie_within_their_box_and_overlap_no_other(number, change):
    assert_neat(draw(change(SAMPLES[number])))


def test_the_generated_workflows_have_every_combinator():
    kinds = set()

    def visit(facts):
        kinds.add(facts["kind"])
        for part in facts["parts"]:
            visit(part)

    for sample in SAMPLES:
        visit(describe(compile(sample)))
    assert kinds == {
        *("async_loop", "ensure", "every", "fuse", "parallel", "program", "repeat", "retry"),
        *("sequence", "stage", "stream", "timeout", "when"),
    }


def running(workflow):
    """The stages that may run at all: not those of a decided branch, or of no repetitions."""
    return [leaf.name for leaf in leaves((workflow,))]


@pytest.mark.parametrize("change", [lambda w: w, compile], ids=["plain", "compiled"])
def test_each_stage_is_drawn_once_in_order(change):
    for sample in map(change, SAMPLES):
        names = running(sample)
        assert len(names) > 0
        drawn = [text for text in texts(draw(sample), "title") if text in names]
        assert drawn == names
        flow = draw(sample, "mermaid")
        nodes = re.findall(r'^ +n\d+\["(.*)"\]:::(?:host|device)$', flow, re.MULTILINE)
        assert nodes == [name.replace("<lambda>", "#60;lambda#62;") for name in names]


def test_describing_names_every_stage_once_in_order_and_is_json():
    for sample in SAMPLES:
        for workflow in (sample, compile(sample)):
            found = []

            def visit(facts, found=found):
                if facts["kind"] == "stage":
                    found.append(facts["name"])
                assert facts["kind"] != "sequence" or facts["parts"]
                for part in facts["parts"]:
                    visit(part)

            facts = json.loads(json.dumps(describe(workflow), allow_nan=False))
            visit(facts)
            assert found == running(workflow)


def test_a_description_has_what_a_stage_and_a_program_say_of_themselves():
    loop = describe(training())["parts"][1]
    assert (loop["kind"], loop["where"], loop["settings"]["count"]) == ("repeat", "host", 8)
    batch, program, log = loop["parts"]
    assert batch == {
        "name": "next_batch",
        "kind": "stage",
        "where": "host",
        "needs": ["data", "step"],
        "optional": [],
        "gives": ["batch"],
        "settings": {},
        "module": __name__,
        "doc": "The batch of a step.",
        "parts": [],
    }
    assert (program["kind"], program["where"]) == ("program", "device")
    assert (program["donates"], program["dropped"]) == (["state"], ["grads"])
    assert program["settings"] == {}
    assert log["optional"] == ["unknown"]
    assert "module" not in loop


def test_settings_are_numbers_text_and_functions_by_what_they_ask_for():
    def seeds(config):
        return []

    loop = repeat(init_state, over=set("edcba"), chunk=2)
    assert describe(loop)["settings"] == {
        "count": None,
        "over": ["a", "b", "c", "d", "e"],
        "start": 0,
        "index": "index",
        "item": "item",
        "chunk": 2,
    }
    settings = describe(repeat(lambda config: 3, init_state, start=lambda first: 2))["settings"]
    assert (settings["count"], settings["start"]) == ("λ(config)", "λ(first)")
    assert describe(stream(seeds, init_state))["settings"]["source"] == "seeds"
    bound = describe(when(partial(seeds, config=1), init_state))["settings"]["condition"]
    assert "seeds" in bound
    assert "0x" not in bound
    assert describe(repeat(init_state, over=np.arange(2)[1:]))["settings"]["over"] == "array([1])"
    assert describe(repeat(init_state, over=[np.int64(3)]))["settings"]["over"] == [3]
    assert describe(retry(next_batch, backoff=float("inf")))["settings"]["backoff"] == "inf"


def test_the_arrow_into_a_stage_says_what_it_takes():
    svg = draw(sequence(init_state, repeat(8, next_batch, forward_backward, log_metrics)))
    drawn = [text for d in read(svg)[1] if (text := d.text) and d.role in ("title", "slots")]
    assert drawn == [
        *("given", "key", "init_state", "repeat 8", "data, step", "next_batch"),
        *("state, batch", "forward_backward", "metrics, step", "log_metrics"),
    ]


def test_slots_of_the_box_before_are_dark_and_those_from_further_up_are_grey():
    svg = draw(sequence(init_state, repeat(8, next_batch, forward_backward)))
    slots = svg[svg.index('class="slots"', svg.index(">next_batch<")) :]
    ink = {name: ink for ink, name in re.findall(r'<tspan fill="(#\w+)"> ?(\w+),?</tspan>', slots)}
    assert (ink["state"], ink["batch"]) == (GREY, INK)


def test_a_program_is_outlined_and_says_what_it_takes_donates_and_drops():
    for workflow in (training(), training(4)):
        svg = draw(workflow)
        boxes = [d for d in read(svg)[1] if d.role == "box program"]
        assert len(boxes) == len(programs(workflow)) == 2
        assert svg.count("stroke-dasharray") == len(boxes) + 1  # and one in the legend
        assert texts(svg, "title").count("program") == 2
        assert "donates state, drops grads" in texts(svg, "aside")
        slots = texts(svg, "slots")
        assert slots.count("state, batch") == 1  # into the program, and not again in it
        assert slots.count("grads") == 1


def test_what_goes_from_turn_to_turn_goes_back_beside_the_loop():
    def loops(workflow):
        root = ET.fromstring(draw(workflow))
        return ["".join(e.itertext()) for e in root.iter() if e.get("class") == "loop"]

    count = stage("n")(lambda n: n + 1)
    assert loops(training()) == ["state"]
    assert loops(repeat(3, count)) == ["n"]
    assert loops(repeat(3, next_batch)) == []
    assert loops(stream(lambda: [], count)) == ["n"]
    make = stage("item", host=True)(lambda n: n)
    learn = stage("n")(lambda n, item: n)
    assert loops(async_loop(make, learn, stop_when=lambda step: True)) == ["n"]


def test_a_producer_and_its_consumer_are_side_by_side_with_arrows_both_ways():
    make = stage("rollouts", host=True)(lambda state, version: 0)
    learn = stage("state")(lambda state, rollouts: 0)
    svg = draw(async_loop(make, learn, stop_when=lambda step: True))
    drawn = {d.text: d.rect for d in read(svg)[1] if d.role == "title"}
    left, right = drawn["producer"], drawn["consumer"]
    assert left.top == right.top
    assert left.right < right.left
    between = [
        d.text
        for d in read(svg)[1]
        if d.role == "slots" and left.right < d.rect.left and d.rect.right < right.left
    ]
    assert between == ["rollouts", "state"]


def test_many_slots_beside_small_boxes_have_room():
    names = [f"slot_{number}" for number in range(60)]
    many = eval(f"lambda {', '.join(names)}: None")
    assert_neat(draw(repeat(3, stage(*names)(many))))
    make = stage(*names, host=True)(lambda: None)
    eat = stage(host=True)(lambda slot_0: None)
    assert_neat(draw(async_loop(make, eat, stop_when=lambda step: True)))


def test_branches_are_side_by_side():
    one, two = stage("a")(lambda x: x), stage("b")(lambda x: x)
    svg = draw(when(lambda x: x, one, otherwise=two))
    titles = {d.text: d.rect for d in read(svg)[1] if d.role == "title"}
    assert titles["then"].top == titles["otherwise"].top
    assert titles["when λ(x)"].top < titles["then"].top
    boxes = [d.rect for d in read(draw(parallel(one, two)))[1] if d.role == "box device"]
    assert boxes[0].top == boxes[1].top
    assert boxes[0].right < boxes[1].left


@pytest.mark.parametrize(
    ("workflow", "title"),
    [
        (repeat(500, init_state, chunk=16), "repeat 500 · chunk 16"),
        (repeat(lambda config: 1, init_state), "repeat λ(config)"),
        (
            repeat(9, init_state, start=lambda first: 1, index="i"),
            "repeat 9 · from λ(first) · as i",
        ),
        (repeat(init_state, over=[1, 2, 3]), "repeat over 3 items"),
        (every(100, init_state), "every 100"),
        (every(100, init_state, index="i"), "every 100 · of i"),
        (when(lambda step, first_step: True, init_state), "when λ(step, first_step)"),
        (parallel(init_state, max_concurrency=2), "parallel at most 2 at once"),
        (stream(lambda: [], init_state, prefetch=3), "stream λ() · prefetch 3"),
        (retry(next_batch, attempts=5), "retry 5 attempts · backoff 1 s · on OSError"),
        (timeout(next_batch, 1.5), "timeout 1.5 s"),
        (
            async_loop(next_batch, init_state, stop_when=lambda step: True),
            "async_loop until λ(step) · buffer 4",
        ),
        (ensure(next_batch, log_metrics), "ensure"),
        (ensure(next_batch, log_metrics), "cleanup"),
        (fuse(init_state), "fuse"),
    ],
)
def test_a_scope_says_its_combinator_and_argument(workflow, title):
    assert title in texts(draw(workflow), "title")
    assert f'["{title}"]' in draw(workflow, "mermaid")


def test_the_arrow_into_a_scope_says_what_its_argument_asks_for():
    def arrow_into(scope):
        before = stage("x", "y", "z", "step")(lambda: 0)
        drawn = [d for d in read(draw(sequence(before, scope)))[1] if d.role in ("slots", "title")]
        at = next(i for i, d in enumerate(drawn) if d.text.startswith(scope.kind))
        return drawn[at - 1].text if drawn[at - 1].role == "slots" else ""

    body = stage("z")(lambda z: z)
    assert arrow_into(when(lambda x, y=0, missing=0: True, body)) == "x, y"
    assert arrow_into(repeat(lambda x: 2, body, start=lambda y: 0)) == "x, y"
    assert arrow_into(every(5, body)) == "step"
    assert arrow_into(stream(lambda y: [], body)) == "y"
    make = stage("item", host=True)(lambda: 0)
    assert arrow_into(async_loop(make, body, stop_when=lambda step, x: True)) == "x"
    assert arrow_into(parallel(body)) == ""


def test_what_cannot_run_is_not_drawn():
    never = sequence(every(0, next_batch), when(False, init_state, otherwise=optim_step))
    assert texts(draw(never), "title") == ["given", "optim_step"]
    assert texts(draw(sequence(every(0, next_batch))), "title") == ["nothing to run"]
    assert "nothing to run" in draw(sequence(every(0, next_batch)), "mermaid")


def test_a_mermaid_chart_is_balanced_and_connects_only_what_it_has():
    for sample in SAMPLES:
        lines = draw(compile(sample), "mermaid").splitlines()
        assert lines[0] == "flowchart TB"
        depth = 0
        for line in lines:
            depth += line.strip().startswith("subgraph ") - (line.strip() == "end")
            assert depth >= 0
        assert depth == 0
        text = "\n".join(lines)
        nodes = re.findall(r"^ +(n\d+)\[", text, re.MULTILINE)
        assert len(nodes) == len(set(nodes))
        edges = re.findall(r'^ +(\w+) -\.?->(?:\|"[^"]*"\|)? (\w+)$', text, re.MULTILINE)
        assert len(edges) == sum("->" in line for line in lines)
        assert {end for edge in edges for end in edge} <= set(nodes)


def test_a_mermaid_chart_has_slots_on_its_edges():
    flow = draw(training(), "mermaid")
    ids = {name: node for node, name in re.findall(r'(n\d+)\["(.*?)"\]', flow)}
    batch, grads, optim, log = (
        ids[s.name] for s in (next_batch, forward_backward, optim_step, log_metrics)
    )
    for edge in (
        f'{ids["given key, data"]} -->|"key"| {ids["init_state"]}',
        f'{batch} -->|"state, batch"| {grads}',
        f'{grads} -->|"grads"| {optim}',
        f'{optim} -->|"metrics, step"| {log}',
        f'{log} -.->|"state"| {batch}',
    ):
        assert f"  {edge}\n" in flow
    assert flow.count(" program\n") == len(programs(training()))


def test_a_mermaid_chart_leaves_an_async_loop_by_its_consumer():
    make = stage("rollouts", host=True)(lambda state, version: 0)
    learn = stage("state")(lambda state, rollouts: 0)
    loop = async_loop(make, learn, stop_when=lambda step: True)
    edges = re.findall(r"^  (n.*)$", draw(sequence(loop, optim_step), "mermaid"), re.MULTILINE)
    assert [edge for edge in edges if "->" in edge] == [
        'n3 -.->|"state"| n3',
        'n2 -.->|"rollouts"| n3',
        'n3 -.->|"state"| n2',
        'n1 -->|"state, version"| n2',
        'n1 -->|"state, rollouts"| n3',
        'n3 -->|"state, grads"| n4',
    ]


def test_letters_of_the_formats_own_languages_are_escaped():
    def shady(x):
        """A <b>docstring</b> & \x1b more."""

    shady.__name__ = 'a<b>&"c'
    workflow = sequence(stage("x")(lambda x: x), stage("x")(shady))
    svg = draw(workflow)
    assert "<lambda>" not in svg
    assert "<b>" not in svg
    assert texts(svg, "title") == ["given", "<lambda>", 'a<b>&"c']
    flow = draw(workflow, "mermaid")
    assert '["#60;lambda#62;"]:::device' in flow
    assert '["a#60;b#62;#38;#34;c"]:::device' in flow


def test_a_picture_needs_nothing_from_elsewhere_and_is_always_the_same():
    svg = draw(training())
    assert svg == draw(training())
    page = next(element for element in ET.fromstring(svg).iter() if element.tag.endswith("rect"))
    assert page.get("fill") == "#ffffff"  # also where the notebook is dark
    assert re.findall(r"(?:https?:|url\(|href|<script|<style|@import)[^\"]*", svg) == [
        "http://www.w3.org/2000/svg"
    ]


@pytest.mark.parametrize("name", ["a.svg", "a.mmd", "a.mermaid", "a.MD"])
def test_a_picture_is_saved_by_its_ending(name, tmp_path):
    path = save(training(), str(tmp_path / name))
    assert path == tmp_path / name
    text, flow = path.read_text(encoding="utf-8"), draw(training(), "mermaid")
    expected = {"a.svg": draw(training()), "a.MD": f"```mermaid\n{flow}```\n"}
    assert text == expected.get(name, flow)


def test_other_endings_and_formats_are_refused_and_misspellings_answered(tmp_path):
    with pytest.raises(ValueError, match=r"'a.png'.* '.png', is none of .svg, .mmd, .mermaid, .md"):
        save(training(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"no format 'mermade'\. Did you mean 'mermaid'\?"):
        draw(training(), "mermade")


def test_a_notebook_shows_a_workflow_as_a_picture():
    assert training()._repr_mimebundle_()["image/svg+xml"] == draw(training())
