import json

import pytest

from crucible.train.data import bundled_conversations
from crucible.train.messages import ROLES, Message, conversation, read_conversations, read_rows

HI = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}'


def write(tmp_path, *lines):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def row(**message):
    return json.dumps({"messages": [{"role": "user", "content": "Hi"} | message]})


def test_a_file_is_read_in_order(tmp_path):
    second = '{"messages": [{"role": "system", "content": "Grüße 🙂"}], "topic": "other keys pass"}'
    assert read_conversations(write(tmp_path, HI, second)) == [
        (Message("user", "Hi"), Message("assistant", "Yes?")),
        (Message("system", "Grüße 🙂"),),
    ]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + HI.encode() + b"\r", "", "  \r", HI, "")
    assert len(read_conversations(path)) == 2


def test_a_line_separator_inside_a_content_does_not_end_the_line(tmp_path):
    path = write(tmp_path, row(content="one\u2028two").replace("\\u2028", "\u2028"))
    assert read_conversations(path) == [(Message("user", "one\u2028two"),)]


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    path = write(tmp_path, HI)
    with pytest.raises(FileNotFoundError, match=r"chat\.jsonl.* Did you mean .*chats\.jsonl\?"):
        read_conversations(tmp_path / "chat.jsonl")
    with pytest.raises(FileNotFoundError, match="Nor is there a folder"):
        read_conversations(tmp_path / "no" / "chats.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        read_conversations(path.parent)


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_file_shows_what_to_write(tmp_path, lines):
    with pytest.raises(ValueError, match=r"holds no conversation .*\"role\": \"user\"") as error:
        read_conversations(write(tmp_path, *lines))
    example = str(error.value).split("one a line: ")[1]
    assert len(read_conversations(write(tmp_path, example))) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": [}', r"chats\.jsonl:3, column 15: not JSON: Expecting value"),
        ("[", r"chats\.jsonl:3, column 2: not JSON"),
        (b'{"messages": "\xff"}', r"chats\.jsonl:3: byte 15 \(0xff\) is not UTF-8"),
        ("[1]", r"chats\.jsonl:3: the line is a list, but must be"),
        ('{"text": 1, "id": 2}', r":3: the line is an object with the keys \['id', 'text'\]"),
        ('{"messages": []}', r":3: messages is empty"),
        ('{"messages": {"role": "user"}}', r":3: messages is an object, but must be a list"),
        ('{"messages": "Hi"}', r":3: messages is a string, but must be a list"),
        ('{"messages": null}', r":3: messages is null, but must be a list"),
        ('{"messages": ["Hi"]}', r":3: messages\[0\] is a string, but must be"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] has no 'content'; .* \['role'\]"),
        (row(weight=0), r"messages\[0\] has a key 'weight' that nothing here reads"),
        (row(role="asistant"), r":3: .*role 'asistant'; .*Did you mean 'assistant'\?"),
        (row(role="USER"), r"role 'USER'; .*Did you mean 'user'\?"),
        (row(role="tool"), r"role 'tool'; roles are system, user, assistant\.$"),
        (row(role=None), r"role None; roles are"),
        (row(content=None), r":3: messages\[0\] has a content that is null"),
        (row(content=["Hi"]), r"content that is a list, but must be text"),
        (row(content="\ud83d!"), r"lone surrogate, U\+D83D\) at position 0"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path, line, says):
    with pytest.raises(ValueError, match=says):
        read_conversations(write(tmp_path, HI, "", line, HI))


class Store:
    name = "a store"

    def __init__(self, *rows):
        self.rows = lambda: iter(rows)


def test_a_store_is_read_as_a_file_with_the_same_rows_is(tmp_path):
    lines = [HI, '{"messages": [{"role": "system", "content": "Be kind."}], "topic": "other"}']
    from_file = read_conversations(write(tmp_path, *lines))
    assert read_conversations(Store(*map(json.loads, lines))) == from_file
    assert len(from_file) == 2


def test_rows_keep_their_other_keys(tmp_path):
    lines = [HI, "", '{"messages": [{"role": "user", "content": "Yes?"}], "topic": [1]}']
    rows = list(read_rows(write(tmp_path, *lines)))
    assert rows == [json.loads(line) for line in lines if line]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": 1}', r"chats\.jsonl:3: the line is an object with the keys \['text'\]"),
        (row(role="USER"), r"chats\.jsonl:3: messages\[0\] has the role 'USER'"),
        ("[", r"chats\.jsonl:3, column 2: not JSON"),
    ],
)
def test_rows_are_checked_as_conversations_are(tmp_path, line, says):
    path = write(tmp_path, HI, "", line)
    with pytest.raises(ValueError, match=says) as of_rows:
        list(read_rows(path))
    with pytest.raises(ValueError, match=says) as of_conversations:
        read_conversations(path)
    assert str(of_rows.value) == str(of_conversations.value)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([1], r"^a store, row 1 \(from 0\): the row is a list, but must be"),
        ({"text": 1, "id": 2}, r"row 1 \(from 0\): the row is .* the keys \['id', 'text'\]"),
        ({"text": 1, 2: 3}, r"the keys \['2', 'text'\]"),
        ({"messages": []}, r"^a store, row 1 \(from 0\): messages is empty"),
        (json.loads(row(role="bot")), r"^a store, row 1 \(from 0\): messages\[0\] has the role"),
    ],
)
def test_a_bad_row_of_a_store_is_named_with_what_is_wrong(bad, says):
    with pytest.raises(ValueError, match=says):
        read_conversations(Store(json.loads(HI), bad))


def test_a_store_without_rows_is_named():
    with pytest.raises(ValueError, match=r"^a store holds no conversation: it gave no rows"):
        read_conversations(Store())


@pytest.mark.parametrize(
    ("source", "kind"),
    [(None, "null"), ([json.loads(HI)], "a list"), (type("A", (), {"name": "a"})(), "a A")],
)
def test_what_is_neither_a_path_nor_a_store_is_refused(source, kind):
    with pytest.raises(TypeError, match=f"cannot be read from {kind}: .*a method 'rows'"):
        read_conversations(source)
    nameless = type("B", (), {"rows": lambda self: [json.loads(HI)]})()
    with pytest.raises(TypeError, match=r"from a B: .*an attribute 'name'"):
        read_conversations(nameless)


def test_the_message_at_fault_is_counted_within_its_line():
    with pytest.raises(ValueError, match=r"^messages\[1\] has the role 'bot'"):
        conversation([Message("user", "Hi"), {"role": "bot", "content": "Yes?"}])


def test_messages_and_dicts_make_the_same_conversation():
    messages = (Message("user", ""), Message("assistant", "Yes?"))
    assert conversation(messages) == messages
    assert conversation(message._asdict() for message in messages) == messages


def test_one_message_is_not_taken_for_a_conversation():
    with pytest.raises(ValueError, match="must be a list of messages"):
        conversation({"role": "user", "content": "Hi"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"messages\[0\] is a string"):
        conversation(Message("user", "Hi"))  # type: ignore[arg-type]


def test_the_bundled_conversations_are_as_promised():
    path = bundled_conversations()
    assert path.stat().st_size <= 1_000_000
    conversations = read_conversations(path)
    assert len(conversations) > 2000
    for messages in conversations:
        roles = [message.role for message in messages]
        assert roles == ["user", "assistant"] * (len(messages) // 2)
        assert all(message.content.strip() for message in messages)
    assert len(set(conversations)) == len(conversations)
    text = path.read_text(encoding="utf-8").lower()
    assert not any(unwanted in text for unwanted in ("http", "www.", "@", "my name"))
    notice = (path.parent / "NOTICE").read_text()
    assert f"{len(conversations):,} of" in notice
    assert "Copyright (c) 2019 Perception, Control and Cognition Lab" in notice


def test_roles_are_the_three_that_every_format_has():
    assert set(ROLES) == {"system", "user", "assistant"}
