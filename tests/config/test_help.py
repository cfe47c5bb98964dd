"""Help and documentation list every key, and the stored page is the one that the schema gives."""

from pathlib import Path

from internlm.config.fields import keys
from internlm.config.help import render_help, render_markdown
from internlm.config.legacy import TABLE
from internlm.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]


def schema_paths(schema: dict, definitions: dict, prefix: str = "") -> set[str]:
    """Dotted paths of all plain keys, from pydantic's own JSON schema."""
    found = set()
    for name, value in schema["properties"].items():
        references = [option["$ref"] for option in [value, *value.get("anyOf", [])] if "$ref" in option]
        if references:
            found |= schema_paths(definitions[references[0].rsplit("/", 1)[1]], definitions, f"{prefix}{name}.")
        else:
            found.add(prefix + name)
    return found


def test_every_key_is_listed():
    schema = Config.model_json_schema()
    expected = schema_paths(schema, schema["$defs"])
    assert {key.path for key in keys()} == expected
    text, page = render_help(), render_markdown()
    for path in expected:
        assert f" {path}  (" in text
        assert f"| `{path}` |" in page
    assert all(f"| `{row.key}` |" in page for row in TABLE)


def test_every_key_has_a_meaning():
    assert [key.path for key in keys() if len(key.meaning) < 5] == []


def test_help_fits_120_columns():
    assert max(map(len, render_help().splitlines())) <= 120


def test_types_in_words():
    types = {key.path: (key.type, key.default) for key in keys()}
    assert types["model.num_layers"] == ("int > 0", "required")
    assert types["model.num_kv_attention_heads"] == ("int > 0 or None", "None")
    assert types["model.checkpoint"] == ("bool or float in [0, 1] or 'selective' | 'feed_forward' | 'offload'", "False")
    assert types["adam.no_decay"] == ("list of str", "[]")
    assert types["data.mixture"] == ("dict of str to float >= 0", "{}")
    assert types["loss.reduction"] == ("'token' | 'micro_batch'", "'token'")
    assert types["ckpt.load_ckpt_info.path"] == ("str", "required")


def test_the_page_in_doc_is_up_to_date():
    page = (ROOT / "doc" / "configuration.md").read_text(encoding="utf-8")
    assert page == render_markdown(), "run: python -m internlm.config.help > doc/configuration.md"
