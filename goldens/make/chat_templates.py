"""Makes goldens/generate/chat_templates.safetensors: texts that transformers 5.23.0 renders from templates of our own.

Run: python chat_templates.py

`cases`, in the metadata, is a JSON list of objects: `template`, `messages`, `add_generation_prompt`, `variables`, and `text`,
or `error` where the template refuses. The templates use what those of published models use: loops and their variables,
namespaces, filters, methods, slices, macros, whitespace control, `tojson`, `raise_exception`. `count` is how many there are.
"""

import json
import pathlib
import sys

for name in ("mamba_ssm", "causal_conv1d", "mambapy", "kernels"):
    sys.modules[name] = None

import upstream  # noqa: E402  before torch: it sets the environment

import numpy as np  # noqa: E402
from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402

import golden_file  # noqa: E402

OUT = pathlib.Path(__file__).resolve().parent.parent / "generate" / "chat_templates.safetensors"

TEMPLATES = {
    "marked": """{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '\\n' + message.content | trim + '<|end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
{%- endif %}
""",
    "bracketed": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}{% else %}{% set system = none %}{% set rest = messages %}{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message.role == 'user' %}
[ASK]{% if loop.first and system is not none %}<<{{ system }}>>{% endif %}{{ message.content.strip() }}[/ASK]
    {% elif message.role == 'assistant' %}
 {{ message.content.split('</think>')[-1].lstrip('\\n') }}{{ eos_token }}
    {% endif %}
{% endfor %}""",
    "tools": """{%- set ns = namespace(last=0, seen=false) %}
{%- if tools %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}{{ '\\n' }}
        {{- tool | tojson(indent=2) }}{{ '\\n' }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages[::-1] %}{{ loop.index }}/{{ loop.length }}{{ ' ' if not loop.last else ';' }}{%- endfor %}
{%- macro tag(name, text='') %}<{{ name }}>{{ text }}</{{ name }}>{% endmacro %}
{%- for message in messages if message.role not in ['system'] %}
    {%- if message.content is string and message.content.startswith('/') %}{% continue %}{% endif %}
    {{- tag(message.role | upper, message.content | replace('a', 'A') | default('none')) }}
    {%- if loop.index0 >= ns.last and not ns.seen %}{% set ns.seen = true %}{{ ' <- last' }}{% endif %}
{%- endfor %}
{%- for key, value in {'b': 1, 'a': [true, none, 2.5, "it's \\"é\\" <&>"]}.items() %}{{ key ~ '=' ~ value | tojson }}, {% endfor %}
{{- messages | map(attribute='role') | join('-') }} {{ (messages | length) }} {{ messages[-1].content[:3] }} {% if missing is defined %}yes{% else %}no{% endif %}
{%- generation %} end{% endgeneration %}""",
}
CHATS = [
    [("user", "Hello!")],
    [("system", "Be brief."), ("user", " What is a mamba?  "), ("assistant", "<think>hm</think>\nA snake."), ("user", "Also?")],
    [("user", "/skip this"), ("assistant", "äöü 🐍 <b>&amp;</b>"), ("user", "a banana\n")],
    [("user", "one"), ("user", "two")],
]
TOOLS = [{"name": "look_up", "parameters": {"a": ["é", None, False, 1e-3], "type": "object", "z": 1}}]


def main():
    cases = []
    for name, template in TEMPLATES.items():
        for chat in CHATS:
            for add_generation_prompt in (True, False):
                messages = [{"role": role, "content": content} for role, content in chat]
                variables = {"bos_token": "<s>", "eos_token": "</s>"}
                if name == "tools" and add_generation_prompt:
                    variables["tools"] = TOOLS
                case = {"template": template, "messages": messages, "add_generation_prompt": add_generation_prompt,
                        "variables": variables}
                extra = {key: value for key, value in variables.items() if key != "tools"}
                try:
                    texts, _ = render_jinja_template(
                        [messages], chat_template=template, tools=variables.get("tools"),
                        add_generation_prompt=add_generation_prompt, **extra,
                    )
                    case["text"] = texts[0]
                except Exception as error:
                    case["error"] = str(error)
                print(name, repr(case.get("text", case.get("error"))))
                cases.append(case)
    metadata = {"producer": "transformers chat templates", "producer_version": upstream.version("transformers", "jinja2"),
                "seed": "none: nothing is random", "cases": json.dumps(cases)}
    golden_file.write(OUT, {"count": np.array([len(cases)])}, metadata, 64 * 1024)


if __name__ == "__main__":
    main()
