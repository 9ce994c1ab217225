"""Tokenizer, chat template and configuration as they are read at the start."""

import asyncio
import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from anybit.engine.errors import CheckpointError
from anybit.server import chat_template as chat_template_module
from anybit.server.chat_template import ChatTemplate, load_chat_template
from anybit.server.config import ConfigError, ServerConfig
from anybit.server.errors import ContextLengthError, InvalidRequestError
from anybit.server.tokenizer import PromptTokenizer, load_tokenizer
from tests.server.tiny_checkpoint import write_checkpoint

HI = [{"role": "user", "content": "<Hi> & 'you'"}]


def encode(tokenizer: PromptTokenizer, text: str, max_tokens: int = 10_000, special: bool = True) -> list[int]:
    return asyncio.run(tokenizer.encode(text, add_special_tokens=special, max_tokens=max_tokens, param="prompt"))


def test_special_tokens_come_from_both_configs(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.eos_token_ids == {0, 1}
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}


def test_truncation_and_padding_of_the_file_are_ignored(tokenizer, tmp_path):
    changed = Tokenizer.from_str(tokenizer.to_str())
    changed.enable_truncation(3)
    changed.enable_padding(length=50)
    loaded = load_tokenizer(write_checkpoint(tmp_path, changed))
    text = "one two three four five"
    assert encode(loaded, text) == tokenizer.encode(text).ids


def test_bos_is_added_only_where_the_tokenizer_adds_it(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    changed = Tokenizer.from_str(tokenizer.to_str())
    changed.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)])
    loaded = load_tokenizer(write_checkpoint(tmp_path, changed))
    assert encode(loaded, "one") == [2, *tokenizer.encode("one").ids]
    assert encode(loaded, "one", special=False) == tokenizer.encode("one").ids


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"model": 5}'])
def test_unreadable_tokenizer_is_a_checkpoint_error(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_damaged_config_is_a_checkpoint_error(tokenizer, tmp_path, content):
    write_checkpoint(tmp_path, tokenizer)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_missing_configs_are_fine(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_token_ids == frozenset()
    with pytest.raises(InvalidRequestError, match="no chat template"):
        load_chat_template(tmp_path, {}).render(HI)


def test_text_that_cannot_fit_is_refused_by_its_length(tokenizer):
    prompt_tokenizer = PromptTokenizer(tokenizer, {}, frozenset())
    longest = max(map(len, tokenizer.get_vocab()))
    text = "a" * (longest * 1000)
    assert len(encode(prompt_tokenizer, text, 1000)) > 1000  # just possible by its length
    with pytest.raises(ContextLengthError, match="at least 1001 tokens, but the context holds 1000"):
        encode(prompt_tokenizer, text + "a", 1000)


@pytest.mark.parametrize(
    ("model", "pre_tokenizer", "normalizer"),
    [
        (models.BPE({"[UNK]": 0, "a": 1}, [], unk_token="[UNK]", fuse_unk=True), None, None),
        (models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), pre_tokenizers.Whitespace(), None),
        (models.BPE({"a": 0, " ": 1}, []), pre_tokenizers.WhitespaceSplit(), None),
        (models.BPE({"a": 0, " ": 1}, []), None, normalizers.Replace("  ", "")),
    ],
)
def test_tokenizers_that_swallow_text_are_not_judged_by_its_length(model, pre_tokenizer, normalizer):
    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    text = " " * 5000 + "a" if normalizer or pre_tokenizer else "x" * 5000
    assert len(encode(PromptTokenizer(tokenizer, {}, frozenset()), text, 5)) <= 2


def test_long_text_does_not_hold_the_event_loop(tokenizer):
    async def measure() -> int:
        turns = 0
        task = asyncio.create_task(
            PromptTokenizer(tokenizer, {}, frozenset()).encode(
                "The quick brown fox. " * 20_000, add_special_tokens=True, max_tokens=10**6, param="prompt"
            )
        )
        while not task.done():
            await asyncio.sleep(0.001)
            turns += 1
        return turns

    assert asyncio.run(measure()) > 10


def test_template_writes_json_without_html_escapes():
    template = ChatTemplate("{{ messages | tojson }}", {})
    assert template.render(HI) == json.dumps(HI)


def test_template_gets_special_tokens_and_generation_prompt():
    template = ChatTemplate("{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}", {"bos_token": "<s>"})
    assert template.render(HI) == "<s>||True"


def test_template_blocks_are_trimmed_and_loops_can_break():
    source = """\
{% for message in messages %}
    {% if loop.index > 1 %}
{% break %}
    {% endif %}
[{{ message.role }}]
{% endfor %}"""
    assert ChatTemplate(source, {}).render(HI * 3) == "[user]\n"


def test_template_generation_block_is_its_content():
    assert ChatTemplate("a{% generation %}b{% endgeneration %}c", {}).render(HI) == "abc"


def test_template_knows_the_date():
    assert len(ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}).render(HI)) == 10


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].__init__.__globals__ }}{{ 1 / 0 }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages.missing.attribute }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' | format_map }}",
    ],
)
def test_template_that_misbehaves_is_a_400(source):
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source, {}).render(HI)


def test_template_that_writes_too_much_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_template_module, "MAX_RENDERED_CHARACTERS", 10_000)
    with pytest.raises(InvalidRequestError, match="too much text"):
        ChatTemplate("{% for i in range(90000) %}{{ messages[0].content }}{% endfor %}", {}).render(HI)


def test_template_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_template_module, "MAX_RENDER_SECONDS", 0.05)
    source = "{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="takes too long"):
        ChatTemplate(source, {}).render(HI)


def test_broken_template_says_so():
    with pytest.raises(InvalidRequestError, match="template of this model is broken"):
        ChatTemplate("{% if %}", {}).render(HI)


def test_template_file_goes_before_the_config(tokenizer, tmp_path):
    write_checkpoint(tmp_path, tokenizer, "from config")
    assert load_chat_template(tmp_path, {}).render(HI) == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert load_chat_template(tmp_path, {}).render(HI) == "from file"


def test_named_templates_use_the_default(tokenizer, tmp_path):
    write_checkpoint(tmp_path, tokenizer)
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_chat_template(tmp_path, {}).render(HI) == "plain"


@pytest.mark.parametrize(
    "settings",
    [
        {"model_name": ""},
        {"model_name": "a\nb"},
        {"model_name": "a@4bit"},
        {"port": -1},
        {"port": 65_536},
        {"api_keys": ("",)},
        {"api_keys": ("has space",)},
        {"api_keys": ("kéy",)},
        {"max_body_bytes": 0},
        {"max_queued_requests": 0},
        {"max_queued_tokens": 0},
        {"request_timeout_seconds": 0},
        {"request_timeout_seconds": float("nan")},
        {"stall_seconds": float("inf")},
        {"drain_timeout_seconds": -1},
    ],
)
def test_wrong_settings_are_refused(tmp_path, settings):
    with pytest.raises(ConfigError):
        ServerConfig(**{"model_name": "tiny", "checkpoint_dir": tmp_path, **settings})


def test_keys_are_not_part_of_the_printed_config(tmp_path):
    assert "hush" not in repr(ServerConfig(model_name="tiny", checkpoint_dir=tmp_path, api_keys=("hush",)))
