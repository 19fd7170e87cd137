"""Conversations for chat templates: those in templates/, which have the constructs of the families that Hugging Face's models use
and were written for this test, and the models' own as the package trl has them, where it is installed (only its files are read).
"""
import importlib.util
import pathlib

TOOLS = [
    {"type": "function", "function": {
        "name": "get_weather", "description": "Weather of a city.\nIn degrees.",
        "parameters": {"type": "object", "properties": {
            "city": {"type": "string", "description": " the city "},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            "days": {"type": "array", "items": {"type": "integer"}}}, "required": ["city"]},
        "return": {"type": "string", "description": "words"}}},
    {"type": "function", "function": {
        "name": "größe", "description": "Übersetzt \"etwas\" <b>&</b>",
        "parameters": {"type": "object", "properties": {
            "x": {"type": ["string", "integer"]}, "map": {"type": "object", "additionalProperties": {"type": "number"}},
            "deep": {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "boolean"}}}}}}}}},
    {"type": "function", "function": {"name": "none", "description": "", "parameters": {"type": "object", "properties": {}}}},
]

CALL = {"type": "function", "id": "call12345",
        "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": [1, 2]}}}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CONVERSATIONS = [
    [turn("user", "Hello")],
    [turn("system", "Be brief."), turn("user", "Hello")],
    [turn("user", " Hello\n"), turn("assistant", "\n Hi there "), turn("user", "世界 🎉 <b>&amp;</b> {{ x }} {% y %}")],
    [turn("system", "  /no_think Be\nkind. "), turn("user", "a"), turn("assistant", "<think>\nhm\n</think>\n\nb"),
     turn("user", "c"), turn("assistant", "d")],
    [turn("system", ""), turn("user", ""), turn("assistant", ""), turn("user", "")],
    [turn("user", "Weather?"), turn("assistant", None, tool_calls=[CALL]),
     turn("tool", "12°, \"rain\"", tool_call_id="call12345"), turn("assistant", "12 degrees.")],
    [turn("user", "Weather?"), turn("assistant", "", tool_calls=[CALL, CALL]), turn("tool", "12"), turn("tool", "13"),
     turn("assistant", "Fine.", reasoning_content="two\n"), turn("user", "ok")],
    [turn("user", "Weather?"),
     turn("assistant", "wait", tool_calls=[{**CALL, "function": {"name": "f", "arguments": "{\"a\": 1}"}}]),
     turn("tool", {"content": 5})],
    [turn("user", [{"type": "text", "text": " look "}, {"type": "image"}, {"type": "text", "text": "there"}])],
    [turn("assistant", "I begin"), turn("user", "no")],
    [turn("user", "a"), turn("user", "b")],
    [turn("user", None)],
    [turn("wizard", "?")],
    [{"role": "user"}],
    [{"content": "no role"}],
    [turn("user", 5), turn("assistant", 1.5), turn("user", True)],
    [turn("system", "S1"), turn("system", "S2 /override"), turn("user", "x'y\"z\\")],
    [turn("user", "x" * 50 + "\n" + "y\t" * 20), turn("assistant", "z " * 30)],
    [],
]

SETTINGS = [
    {"bos_token": "<s>", "eos_token": "</s>"},
    {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True},
    {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, "tools": TOOLS, "enable_thinking": False},
    {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": False, "tools": TOOLS[:1], "enable_thinking": True,
     "builtin_tools": ["code_interpreter", "get_weather"], "date_string": "26 Jul 2024",
     "documents": [{"text": "one"}, {"text": "two"}], "controls": {"length": "short"}},
    {"bos_token": "", "eos_token": "", "tools": None, "tools_in_user_message": False, "add_generation_prompt": True},
    {"bos_token": "<s>", "eos_token": "</s>", "tools": TOOLS, "tools_in_user_message": False},
    {},
]


def installed():
    spec = importlib.util.find_spec("trl")
    folders = spec.submodule_search_locations if spec else []
    return sorted(path for folder in folders for path in pathlib.Path(folder, "chat_templates").glob("*.jinja"))


def all_cases(paths=None):
    for path in paths or sorted((pathlib.Path(__file__).parent / "templates").glob("*.jinja")):
        template = path.read_text()
        for messages in CONVERSATIONS:
            for settings in SETTINGS:
                yield template, {"messages": messages, **settings}
