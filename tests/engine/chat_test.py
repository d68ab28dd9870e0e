"""Chat templates mean what they mean in `transformers`."""

import datetime

import pytest

from infinite_llm.engine.chat import ChatTemplate
from infinite_llm.errors import CheckpointError, RequestError
from infinite_llm.models.loaded_model import GenerationDefaults

# The shape of Llama's and Mistral's: blocks on lines of their own.
_TEMPLATE = """\
{{- bos_token }}
{% for message in messages %}
    {%- if message['role'] == 'tool' %}
        {{- raise_exception('Tools are not supported!') }}
    {%- endif %}
    {# Turns are framed. #}
    {%- if loop.index0 > 8 %}{% break %}{% endif %}
[{{ message.role }}]
{{ message['content'] | trim }}
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}

{% endfor %}
{% if add_generation_prompt %}
[assistant]
{% endif %}
"""

_TALK = [
  {"role": "system", "content": " Be brief. "},
  {"role": "user", "content": "1 < 2?"},
  {"role": "assistant", "content": "Yes."},
  {"role": "user", "content": "Thanks."},
]


def template(source: str | None, **tokens) -> ChatTemplate:
  tokens = {"bos_token": "<s>", "eos_token": "</s>"} | tokens
  return ChatTemplate(GenerationDefaults(chat_template=source, **tokens))


def render(source: str, messages=_TALK, **options) -> str:
  return template(source).render(messages, **options)


def test_blocks_leave_no_blank_lines():
  assert render(_TEMPLATE) == (
    "<s>\n[system]\nBe brief.\n"
    "[user]\n1 < 2?\n"
    "[assistant]\nYes.</s>\n"
    "[user]\nThanks.\n"
    "[assistant]\n"
  )


def test_a_generation_prompt_can_be_left_out():
  text = render(_TEMPLATE, add_generation_prompt=False)
  assert text.endswith("[user]\nThanks.\n")


def test_loops_can_be_left():
  text = render(_TEMPLATE, [{"role": "user", "content": "x"}] * 20)
  assert text.count("[user]") == 9


def test_json_is_written_for_models_not_for_browsers():
  messages = [{"role": "user", "content": "<é>'\"", "z": 1, "a": [2]}]
  assert render("{{ messages[0] | tojson }}", messages) == (
    '{"role": "user", "content": "<é>\'\\"", "z": 1, "a": [2]}'
  )
  assert render("{{ messages[0].a | tojson(indent=1) }}", messages) == (
    "[\n 2\n]"
  )


def test_tokens_that_the_checkpoint_lacks_are_undefined():
  source = "{{ bos_token is defined }} {{ bos_token }}|{{ eos_token }}"
  assert template(source, bos_token=None).render(_TALK) == "False |</s>"


def test_the_date_is_that_of_today():
  year = render("{{ strftime_now('%Y') }}")
  assert abs(int(year) - datetime.date.today().year) <= 1


def test_what_a_template_raises_is_told():
  messages = [*_TALK, {"role": "tool", "content": "42"}]
  with pytest.raises(RequestError, match="Tools are not supported!"):
    render(_TEMPLATE, messages)


@pytest.mark.parametrize(
  "source", ["{{ messages.x.y }}", "{{ 1 / 0 }}", "{{ messages + 1 }}"]
)
def test_whatever_goes_wrong_in_a_template_is_told(source):
  with pytest.raises(RequestError, match="template refuses these messages"):
    render(source)


@pytest.mark.parametrize(
  "source",
  [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
  ],
)
def test_a_template_is_not_trusted(source):
  with pytest.raises(RequestError, match=r"unsafe|not safely"):
    render(source)


def test_a_checkpoint_without_template_says_so():
  with pytest.raises(RequestError, match="has no chat template"):
    template(None)


def test_a_template_that_is_no_jinja_names_the_line():
  with pytest.raises(CheckpointError, match=r"not valid Jinja: line 2: "):
    template("{{ bos_token }}\n{% for m in messages %}")


@pytest.mark.parametrize(
  ("messages", "message"),
  [
    ([], r"messages must have at least one message; got none\."),
    (["Hi"], r"messages\[0\] must be a mapping .*; got 'Hi'\."),
    (
      [{"role": "usr", "content": ""}],
      r"messages\[0\]\['role'\] must be one of .*; got 'usr'; did you mean"
      r" 'user'\?",
    ),
    (
      [_TALK[0], {"content": "Hi"}],
      r"messages\[1\]\['role'\] .*; got None\.",
    ),
    (
      [{"role": "user"}],
      r"messages\[0\]\['content'\] must be a text; got None\.",
    ),
    (
      [{"role": "user", "content": ["Hi"]}],
      r"messages\[0\]\['content'\] must be a text; got \['Hi'\]\.",
    ),
  ],
)
def test_what_is_no_conversation_is_refused(messages, message):
  with pytest.raises(RequestError, match=message):
    render(_TEMPLATE, messages)


def test_a_turn_that_calls_tools_needs_no_text():
  call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
  assert render("{{ messages[0].tool_calls[0].name }}", [call]) == "f"
