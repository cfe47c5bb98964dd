"""Rewriting a config of any generation into the spelling of the schema: applies the rows of `legacy.py`."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm.config.legacy import OLD_FAMILIES, TABLE, OldSpelling, Refused, Tree


@dataclass
class Report:
    """What was done to all layers: log lines, problems, and which old keys were met."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)


def modernise(tree: Tree, origin: str, report: Report) -> Tree:
    """`tree` in the spelling of the schema. `origin` (a file, "override") starts each line of the report."""
    tree = copy.deepcopy(tree)
    for row in TABLE:
        found, value, section = _lookup(tree, row.key)
        if not found or not row.applies(value):
            continue
        report.seen.add(row.key)
        del section[row.key.split(".")[-1]]
        try:
            new = row.rewrite(value, section)
        except Refused as refusal:
            report.problems.append(f"{row.key} = {value!r} ({origin}): {refusal}")
            continue
        for key, new_value in new.items():
            _assign(tree, key, new_value, row.key, report)
        report.notes.append(f"{origin}: {row.key} = {_short(value)} -> {_outcome(row, new)}")
    return tree


def _short(value: Any, limit: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _outcome(row: OldSpelling, new: Tree) -> str:
    if new:
        return ", ".join(f"{key} = {_short(value)}" for key, value in new.items())
    reason = row.becomes.split("; otherwise refused")[0]
    return reason if reason.startswith("dropped") else f"dropped ({reason})"


def settle(tree: Tree, report: Report) -> Tree:
    """What depends on several old keys of the merged `tree`; returns the tree with it settled."""
    for one in (_settle_family, _settle_moe_loss, _settle_beta2, _settle_load, _settle_isp):
        tree = one(tree, report)
    return tree


def _settle_moe_loss(tree: Tree, report: Report) -> Tree:
    """A file of 2023 with experts and no balancing loss gets the default of that time."""
    loss = tree.get("loss", {})
    is_old = any(key.startswith(("moe.", "model.moe_")) for key in report.seen)
    is_old |= tree.get("model_type") == "INTERNLM_MoE" and bool(report.seen - {"model.dtype"})
    if not is_old or "moe_loss_coeff" in loss:
        return tree
    report.notes.append("loss.moe_loss_coeff = 1.0: what the framework of 2023 assumed where a file is silent")
    return {**tree, "loss": {**loss, "moe_loss_coeff": 1.0}}


def _settle_family(tree: Tree, report: Report) -> Tree:
    family, model = str(tree.get("model_type", "INTERNLM")), tree.get("model")
    if family not in OLD_FAMILIES or not isinstance(model, dict):
        return tree
    if not any(key.startswith("model.") and key != "model.dtype" for key in report.seen):
        return tree
    missing = {key: value for key, value in OLD_FAMILIES[family].items() if key not in model}
    for key, value in missing.items():
        report.notes.append(f"model.{key} = {value}: what {family} of 2023 assumed where a file is silent")
    return {**tree, "model": {**model, **missing}}


def _settle_beta2(tree: Tree, report: Report) -> Tree:
    """A schedule in the old spelling that is silent on its power means the default of then."""
    schedule = tree.get("beta2_scheduler")
    if "beta2_scheduler.cur_iter" not in report.seen or not isinstance(schedule, dict) or "c" in schedule:
        return tree
    report.notes.append("beta2_scheduler.c = 0.8: what the frameworks of 2023 assumed where a file is silent")
    return {**tree, "beta2_scheduler": {**schedule, "c": 0.8}}


def _settle_load(tree: Tree, report: Report) -> Tree:
    """With auto_resume the frameworks of 2023 ignored load_ckpt_info, and their sample files name no real folder."""
    ckpt = tree.get("ckpt")
    load = ckpt.get("load_ckpt_info") if isinstance(ckpt, dict) else None
    if not isinstance(ckpt, dict) or not isinstance(load, dict) or not isinstance(load.get("path"), str):
        return tree
    # load_given_ckpt=False said outright that the folder is not to be loaded
    is_sample = bool({"ckpt.load_ckpt_info.path", "ckpt.load_given_ckpt"} & report.seen)
    if is_sample and ckpt.get("auto_resume", True) and not Path(load["path"]).exists():
        report.warnings.append(
            f"ckpt.load_ckpt_info.path = {load['path']!r} does not exist; ignored as in 2023, where auto_resume came "
            "first. Set ckpt.auto_resume=False to insist on it"
        )
        return {**tree, "ckpt": {**ckpt, "load_ckpt_info": None}}
    content = load.get("content", ())
    if "ckpt.load_ckpt_folder" in report.seen and not {"scheduler", "all"} & set(content):
        report.warnings.append(
            f"ckpt.load_ckpt_folder = {load['path']!r} takes {', '.join(content)}, as in InternLM 0.2.1: steps and "
            "learning rate begin anew. To go on where it was, set ckpt.load_ckpt_info.content=('all',)"
        )
    return tree


def _settle_isp(tree: Tree, report: Report) -> Tree:
    """With isp, InternEvo counted the ranks of zero1 in groups of weight ranks."""
    parallel = tree.get("parallel")
    if not isinstance(parallel, dict) or not report.seen - {"model.dtype"}:
        return tree
    tensor, weight, zero1 = (parallel.get(key) for key in ("tensor", "weight", "zero1"))
    if not (isinstance(tensor, dict) and tensor.get("mode") == "isp"):
        return tree
    if not (isinstance(weight, dict) and isinstance(zero1, dict)):
        return tree
    size, per_group = zero1.get("size", -1), weight.get("size", 1)
    if not (isinstance(size, int) and isinstance(per_group, int)) or size < 1 or per_group < 2:
        return tree
    report.notes.append(
        f"parallel.zero1.size = {size} -> {size * per_group}: with isp it counted groups of parallel.weight.size = "
        f"{per_group} ranks, here it counts ranks"
    )
    return {**tree, "parallel": {**parallel, "zero1": {**zero1, "size": size * per_group}}}


def _lookup(tree: Tree, key: str) -> tuple[bool, Any, Tree]:
    section: Any = tree
    *parents, last = key.split(".")
    for name in parents:
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict) or last not in section:
        return False, None, {}
    return True, section[last], section


def _assign(tree: Tree, key: str, value: Any, old_key: str, report: Report) -> None:
    section = tree
    *parents, last = key.split(".")
    for name in parents:
        inner = section.setdefault(name, {})
        if parents[0] == "parallel" and isinstance(inner, int):  # parallel.weight = 4 beside parallel.zero1.fsdp
            inner = section[name] = {"size": inner}
        if not isinstance(inner, dict):
            return  # a wrong type, which validation reports
        section = inner
    # beside fsdp, InternEvo's sample files say weight=dict(size=1): no weight parallelism
    is_default = old_key == "parallel.zero1.fsdp" and key == "parallel.weight.size" and section.get(last) == 1
    if last in section and section[last] != value and not is_default:
        report.problems.append(
            f"{old_key} means {key} = {value!r}, but {key} = {section[last]!r} is given too; keep one"
        )
        return
    section[last] = value


def old_keys(prefix: str) -> Iterator[str]:
    """Names of old keys directly below `prefix` ("" for the top level), for spelling suggestions."""
    for row in TABLE:
        section, _, name = row.key.rpartition(".")
        if section == prefix:
            yield name
