"""Rotary settings of a config.json, from any of the keys and names that they have had."""

from typing import Any

from pydantic import ValidationError

from internlm.config.rope_section import RopeScaling
from internlm.utils.errors import UserError

_WHOLE = ("original_max_position_embeddings",)


def rope_of(hf: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings under the names of transformers 5, from any of the places where they were once kept."""
    rotary = hf.get("rotary") or {}  # InternLM, 2023, whose published class takes what isn't there for dynamic
    if hf.get("model_type") == "internlm":
        rotary = {"type": "dynamic", **rotary}
    theta = hf.get("rope_theta") or rotary.get("base", 10000.0)
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters")
    if not scaling and rotary.get("type") == "dynamic":
        scaling = {"rope_type": "dynamic", "factor": rotary.get("scaling_factor", 1.0)}
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {"rope_theta": theta, **scaling, "rope_type": kind}


def refuse_two_ropes(hf: dict[str, Any], file: str) -> None:
    """Of two keys transformers takes the older one, with a base that may be neither's; other engines the newer one."""
    if hf.get("rope_scaling") and hf.get("rope_parameters"):
        kinds = [rope_of({**hf, key: None}) for key in ("rope_parameters", "rope_scaling")]
        older, newer = ({key: value for key, value in kind.items() if key != "type"} for kind in kinds)
        if older != newer:
            raise UserError(
                f"{file}: rope_scaling says {older}, rope_parameters {newer}: keep the right one of the two keys, with "
                "rope_theta in it"
            )


def rope_scaling_of(hf: dict[str, Any], file: str) -> dict[str, Any] | None:
    """`model.rope_scaling`; raises UserError naming a type or key that is not computed here."""
    rope = rope_of(hf)
    kind = rope["rope_type"]
    if kind == "default":
        return None
    others = ("partial_rotary_factor", "rope_theta", "rope_type", "type")
    scaling = {key: value for key, value in rope.items() if key not in others and value is not None}
    if kind in ("yarn", "llama3"):
        outside = hf.get("original_max_position_embeddings")  # transformers prefers it
        inside = scaling.get("original_max_position_embeddings", hf.get("max_position_embeddings"))
        scaling["original_max_position_embeddings"] = outside or inside
    numbers = {
        key: float(value) if type(value) is int and key not in _WHOLE else value for key, value in scaling.items()
    }
    try:
        return RopeScaling.model_validate({"type": kind, **numbers}).model_dump()
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, part['loc']))} {part['msg']}" for part in error.errors())
        raise UserError(
            f"{file}: rope_scaling of type {kind!r} is not supported by our Transformer: {reasons}"
        ) from error
