"""Laws of the compiler over random workflows, in whole numbers, so that equal means equal."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from crucible.kitchen import (
    Context,
    compile,
    ensure,
    every,
    fuse,
    parallel,
    repeat,
    retry,
    sequence,
    stage,
    stream,
    timeout,
    when,
)
from crucible.kitchen.wiring import every_part, may_give

BOUNDED = settings(
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
NAMES = ("a", "b", "v", "m", "best", "part", "n", "total")


def first_context():
    """Slots of several shapes; two of them are one array, and one is the caller's NumPy array."""
    v = jnp.arange(3)
    return Context(
        a=jnp.asarray(1),
        b=7,
        v=v,
        best=v,
        m=np.arange(4, dtype=np.int32).reshape(2, 2),
        part=jnp.asarray(0),
        n=jnp.asarray(2),
        total=0,
    )


def small(x):
    return x % 1009


@stage("a")
def add(a, b):
    return small(a + 3 * b)


@stage("b")
def mix(a, b, v):
    return small(5 * a + b + v.sum())


@stage("v")
def widen(v, a):
    return small(2 * v + a)


@stage("m")
def square(m, b):
    return small(m @ m + b)


@stage("n")
def count(a):
    return a % 3


@stage("grads", "part")
def gradient(v, a):
    return {"w": v + a, "b": a}, a + 1


@stage("v")
def apply(v, grads):
    return small(v - grads["w"] + grads["b"])


@stage("a")
def compare(a, best):
    return small(a + best.sum())


@stage("a", "b")
def swap(a, b):
    return b, a


@stage("m", "total")
def twice(m):
    return m, m.sum()


step_down = sequence(gradient, apply)
DEVICE = (add, mix, widen, square, count, step_down, compare, swap, twice)


class Host:
    """Host stages that write down what they saw, each on a list of its own."""

    def __init__(self):
        self.seen = {}
        self.numbers = itertools.count()

    def note(self, name, *values):
        seen = [np.asarray(value).tolist() for value in values]
        self.seen.setdefault(name, []).append(seen)

    def make(self, kind):
        """A new stage of a kind."""
        name = f"{kind}{next(self.numbers)}"

        def look(a, v, best):
            self.note(name, a, v, best)

        def keep(v):
            self.note(name, v)
            return v  # the very array

        def number(b):
            self.note(name, b)
            return int(b) % 7 + 1

        def array(m, total):
            self.note(name, m, total)
            return np.asarray(m)[::-1] + np.int32(1)

        gives = {"look": (), "keep": ("best",), "number": ("a",), "array": ("m",)}[kind]
        function = {"look": look, "keep": keep, "number": number, "array": array}[kind]
        function.__name__ = name
        return stage(*gives, host=True)(function)

    def undoable(self):
        """A device stage that could be rolled back."""
        return stage("part", rollback=lambda part, a: None)(lambda part, a: small(part + a))


CONDITIONS = (
    lambda a: a % 2 == 0,
    lambda v: v.sum() > 20,
    lambda n: n == 1,
)
COUNTS = (0, 1, 2, 3, lambda n: n, lambda a: a % 3)


class Builder:
    """Random workflows: `pick` chooses, `host` provides."""

    def __init__(self, pick, host):
        self.pick, self.host = pick, host
        self.loops = itertools.count()

    def stages(self, depth, index, device):
        return [self.stage(depth, index, device) for _ in range(self.pick((1, 2, 3)))]

    def leaf(self, device):
        kinds = ["device"] * 4 + ([] if device else ["look", "keep", "number", "array", "undo"])
        kind = self.pick(kinds)
        if kind == "device":
            return self.pick(DEVICE)
        return self.host.undoable() if kind == "undo" else self.host.make(kind)

    def stage(self, depth, index, device):
        kinds = ["leaf"] * 2
        if depth:
            kinds += ["sequence", "repeat", "repeat", "when", "when", "parallel", "fuse"]
            kinds += ["every"] * (2 if index else 0)
            kinds += [] if device else ["around", "ensure", "stream", "over"]
        match self.pick(kinds):
            case "leaf":
                return self.leaf(device)
            case "sequence":
                return sequence(*self.stages(depth - 1, index, device))
            case "fuse":
                return fuse(*self.stages(depth - 1, index, True))
            case "repeat":
                own = self.pick(["step", f"i{next(self.loops)}"])
                body = self.stages(depth - 1, own, device)
                return repeat(self.pick(COUNTS), *body, index=own)
            case "when":
                then = self.stages(depth - 1, index, device)
                other = self.pick([None, self.stage(depth - 1, index, device)])
                return when(self.pick(CONDITIONS), *then, otherwise=other)
            case "every":
                return every(
                    self.pick([1, 2, 3]), *self.stages(depth - 1, index, device), index=index
                )
            case "parallel":
                left, right = (self.stage(depth - 1, index, device) for _ in range(2))
                if may_give(left) & may_give(right):
                    return sequence(left, right)
                return parallel(left, right)
            case "around":
                inside = self.host.make(self.pick(["look", "keep", "number"]))
                return self.pick([retry(inside, attempts=2, backoff=0.0), timeout(inside, 60.0)])
            case "ensure":
                return ensure(
                    self.stage(depth - 1, index, device), self.stage(depth - 1, index, device)
                )
            case "stream":
                own = f"i{next(self.loops)}"
                body = self.stages(depth - 1, own, device)
                more = stage("total")(lambda total, item: small(total + item))
                return stream([3, 4], more, *body, index=own)
            case _:
                own = f"i{next(self.loops)}"
                body = self.stages(depth - 1, own, device)
                more = stage("b")(lambda b, item: small(b + item.sum()))
                return repeat(more, *body, over=lambda v: [v, v], index=own)


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.shape(x) == np.shape(y)
        np.testing.assert_array_equal(x, y)


def agree(plain, compiled, legitimate):
    """What is in both is equal, and what is missing was used up within a program."""
    assert set(compiled) <= set(plain)
    for name in plain:
        if name in compiled:
            same(plain[name], compiled[name])
        else:
            assert name in legitimate, f"{name} is lost"


@BOUNDED
@given(st.data())
def test_fused_equals_unfused(data):
    check_fused(lambda choices: data.draw(st.sampled_from(choices)))


def check_fused(pick):
    host = Host()
    workflow = sequence(*Builder(pick, host).stages(3, None, False))
    note(str(workflow))
    parts = list(every_part(workflow))
    given_ = {n for part in parts if part.fn is not None and not part.host for n in part.gives}
    read = {name for part in parts for name in part.reads}
    numbers = {
        name
        for part in parts
        if part.kind == "fuse"
        for loop in every_part(part)
        if loop.kind == "repeat"
        for name in (loop.settings["index"], loop.settings["item"])
    }
    plain = workflow(first_context())
    seen, host.seen = host.seen, {}

    fused = compile(workflow)
    for _ in range(2):  # the second time nothing is traced
        agree(plain, fused(first_context()), (given_ & read) | numbers)
        assert host.seen == seen
        host.seen = {}

    whole = first_context()
    matrix, before = whole["m"], jax.tree.map(np.array, dict(whole.slots))
    kept = compile(workflow, keep=NAMES, donate=False)
    agree(plain, kept(whole), {"grads"} | numbers)
    assert host.seen == seen
    same(dict(whole.slots), before)
    assert whole["m"] is matrix


class Chunked:
    """Bodies of loops that can run in chunks: `pick` chooses."""

    def __init__(self, pick, host, size):
        self.pick, self.host, self.size = pick, host, size

    def some(self, *makers):
        return [made for make in makers if self.pick((True, False)) for made in make()]

    def body(self):
        before = self.some(self.boundary, self.feeders, self.changing_boundary)
        fed = any("x" in part.gives for part in before)
        device = [self.device(2, fed) for _ in range(self.pick((1, 2, 3)))]
        return [*before, *device, measure, *self.some(self.each, self.at_once, self.summing)]

    def boundary(self):
        period = self.size * self.pick((1, 2))
        return [every(period, self.host.make(self.pick(("look", "keep"))))]

    def changing_boundary(self):
        return [every(self.size, self.host.make("number"), widen)]

    def feeders(self):
        """A host stage for each step, and one that goes on from there."""
        name = f"feed{next(self.host.numbers)}"
        kind = self.pick((lambda x: x, np.int32, jnp.asarray))

        def feed(step):
            self.host.note(name, step)
            return kind(step % 5), {"w": np.arange(3, dtype=np.int32) * step}

        def further(x, step):
            self.host.note(f"{name}/further", x, step)
            return np.int32(x) + np.int32(1), "a text"

        return [
            stage("x", "row", host=True)(feed),
            *([stage("y", "text", host=True)(further)] if self.pick((True, False)) else []),
        ]

    def device(self, depth, fed):
        kinds = ["leaf", "leaf", "eat"] if fed else ["leaf", "leaf"]
        kinds += ["every", "when", "repeat", "fuse", "parallel"] if depth else []
        inside = lambda: [self.device(depth - 1, fed) for _ in range(self.pick((1, 2)))]  # noqa: E731
        match self.pick(kinds):
            case "leaf":
                return self.pick(DEVICE)
            case "eat":
                return self.pick((eat, overwrite))
            case "every":
                return every(self.pick((2, 3)), *inside())
            case "when":
                return when(self.pick(CONDITIONS), *inside(), otherwise=self.pick([None, add]))
            case "repeat":
                return repeat(self.pick(COUNTS), *inside(), index=self.pick(("i0", "i1")))
            case "fuse":
                return fuse(*inside())
            case _:
                left = fuse(*inside())
                return left if "part" in may_give(left) else parallel(left, probe)

    def each(self):
        name = f"each{next(self.host.numbers)}"

        def follow(step, metrics, x=None, text=None):
            self.host.note(name, step, metrics["a"], metrics["v"], -1 if x is None else x)
            assert text in (None, "a text")

        return self.pick(([stage(host=True)(follow)], [every(2, stage(host=True)(follow))]))

    def at_once(self):
        """The same whether it follows each step, or all of a chunk."""
        name = f"once{next(self.host.numbers)}"

        def follow(step, metrics, row=None):
            self.host.note(name, step, metrics["a"], () if row is None else row["w"])

        def all_of_them(step, metrics, row=None):
            assert len(metrics["a"]) == len(step)
            for i, number in enumerate(step):
                now, rows = jax.tree.map(lambda x, i=i: x[i], (metrics, row))
                follow(number, now, rows)

        return [stage(host=True, many=all_of_them)(follow)]

    def summing(self):
        name = f"sum{next(self.host.numbers)}"

        def follow(seen, metrics):
            self.host.note(name, seen)
            return seen + int(metrics["a"])

        return [stage("seen", host=True)(follow)]


@stage("a")
def eat(a, x, row):
    return small(a + x + row["w"].sum())


@stage("x")
def overwrite(x, b):
    return small(x * 2 + b)


@stage("part")
def probe(a, v):
    return small(a + v.sum())


@stage("metrics")
def measure(a, v):
    return {"a": a, "v": v.sum(), "n": None}


@BOUNDED
@given(st.data())
def test_a_loop_in_chunks_equals_the_loop(data):
    check_chunks(lambda choices: data.draw(st.sampled_from(choices)))


def check_chunks(pick):
    host, size = Host(), pick((2, 3, 4))
    body = Chunked(pick, host, size).body()
    start, stop = pick((0, 1, 3, 4)), pick((0, 4, 5, 9))
    loop, chunked = (
        repeat(lambda stop: stop, *body, start=start, chunk=chunk) for chunk in (1, size)
    )
    note(f"{chunked}, {start} to {stop}")
    compiled = compile(chunked, donate=pick((True, False)))
    numbers = {"i0", "i1"}
    parts = list(every_part(chunked))
    given_ = {n for part in parts if part.fn is not None and not part.host for n in part.gives}
    read = {name for part in parts for name in part.reads}

    def first():
        return first_context().replace(stop=stop, seen=0)

    plain = loop(first())
    seen, host.seen = host.seen, {}
    for _ in range(2):
        agree(plain, compiled(first()), (given_ & read) | numbers)
        assert host.seen == seen
        host.seen = {}
