"""The reference of all settings, written from their class: `python -m d2p_pipeline.reference > docs/configuration.md`."""

import ast
import inspect
import sys
from itertools import pairwise
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from d2p_pipeline.settings import ENV_PREFIX, RETIRED, Settings, as_text, fluent_name


def reference() -> str:
    """The text of docs/configuration.md: every setting, from the class alone."""
    lines = [_PREFACE]
    meanings = _meanings()
    for name, field in Settings.model_fields.items():
        if name in Settings.SECTIONS:
            lines += ["", f"## {Settings.SECTIONS[name]}", ""]
            lines += ["| setting | environment | Fluent Bit | default | meaning |", "|---|---|---|---|---|"]
        cells = (
            f"`{name}`",
            f"`{ENV_PREFIX}{name.upper()}`",
            "" if name == "config" else f"`{fluent_name(name)}`",
            _shown_default(field),
            _with_choices(meanings[name], field),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", _RETIRED_PREFACE, "", "| name | instead |", "|---|---|"]
    lines += [f"| `{name}` | {instead} |" for name, instead in RETIRED.items()]
    return "\n".join(lines) + "\n"


def _shown_default(field: FieldInfo) -> str:
    if isinstance(field.json_schema_extra, dict):
        return str(field.json_schema_extra["default"])
    default = field.default
    if default is None or default == ():
        return ""
    if isinstance(default, int) and default >= 2**20:
        return f"`{default}` ({default // 2**20} MiB)"
    text = f"{default:g}" if isinstance(default, float) else as_text(default)
    return f"`{text}`"


def _meanings() -> dict[str, str]:
    """What the text below each setting says. Pydantic could read it too, but would in every process that has settings."""
    [definition] = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        setting.target.id: " ".join(text.value.value.split())
        for setting, text in pairwise(definition.body)
        if isinstance(setting, ast.AnnAssign)
        and isinstance(setting.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _with_choices(meaning: str, field: FieldInfo) -> str:
    if get_origin(field.annotation) is not Literal:
        return meaning
    return f"{meaning} One of {', '.join(f'`{choice}`' for choice in get_args(field.annotation))}."


_PREFACE = """# Configuration

<!-- Written by `python -m d2p_pipeline.reference > docs/configuration.md`; change d2p_pipeline/settings.py instead. -->

Settings come from three places, the strongest first:

1. flags of the command line,
2. the environment: `D2P_` and the setting's name in capitals,
3. the file that `--config` or `D2P_CONFIG` names.

`d2p config` prints the settings in force and where each comes from. Everything that is wrong is reported at once, and a
name that is no setting is an error that names the nearest one. (What Kubernetes adds for a Service called `d2p`, such as
`D2P_PORT=tcp://…` and `D2P_SERVICE_HOST`, is passed over.)

The file is a JSON object, TOML, or a Fluent Bit configuration in classic notation, of which the `[OUTPUT]` section named
`out_parquet` (or the only one) is read; keys that Fluent Bit itself knows, such as `Match`, are left to it, and
`${NAME}` stands for a variable of the environment. In every format a setting may be written in its own or in its Fluent
Bit form; case and underscores make no difference. An empty value means: not given. A name that begins with an underscore is
switched off. Sizes are bytes, or carry a unit: `64MiB`, `1GB`.

Files written for Data2Parquet-go load as they are, except that `use_hmac` needs `hmac_key` and that an `address` beyond
loopback needs `tokens`. These settings mean something else than there:

- Values are not silently moved into a range. A small one, such as a `buffer_size` of 10, a `flush_interval` of 0.5 or a
  `writer_row_group_size` of 512, is taken as it is; zero, a negative number and an unknown choice are errors.
- `buffer_type` is `redis` by default, with an embedded server where none is configured, not `mem`.
- `use_dlq` is true by default, because nothing is lost here unless that is asked for.
- `redis_lock_ttl` is 1.5 × `flush_interval` by default, as documented there, and not endless.
- `try_auto_recover` is true and `recovery_attempts` 3 by default: what can heal itself waits for nobody.
- `default_capability` has no default; a record without a capability is a dead letter, not `undefined`.
- `redis_timeout` is in seconds, and `address` is loopback by default."""

_RETIRED_PREFACE = """## Names that are no settings any more

They are accepted, in either form, and have no effect, which a note says. Two exceptions, where what they stand for is not
given itself: `s3_role_name` with `s3_account` is read as the `s3_role_arn` they amount to, and `disable_log_colors` as
`log_formatter = "text"`."""


if __name__ == "__main__":
    sys.stdout.write(reference())
