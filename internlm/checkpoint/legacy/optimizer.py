"""Optimizer files of 2023: which part of which flat fp32 tensor is which parameter.

Each zero rank wrote one file: per group one flat tensor of masters and two of moments, in which its parameters lie one
after the other, without padding. The plan says which: per group and zero rank the parameters' numbers, counted over the
group's parameters by falling size (stable), followed by their dims, as in `0_103168_4096`. The group's parameters come
in the order of the model file of the same rank.

Experts are a group of their own, `moe_ep_size_N`: of N neighbouring data ranks each held an equal share of the experts,
and data ranks N apart, which held the same, were its zero ranks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.legacy.folder import LegacyFolder, ModelFile
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

_FILE = re.compile(r"optimizer_tp(?P<tp>\d+)(?:_wp(?P<wp>\d+))?_pp(?P<pp>\d+)_(?:zo|dp)(?P<rank>\d+)\.pt")
_BUFFER = re.compile(r".*\.(inv_freq|cos_cached|sin_cached)")
_NORM = re.compile(r"(?:.*\.)?norm[12]?\.weight")
_EXPERTS = re.compile(r"moe_ep_size_(\d+)")
_EMBED_OR_HEAD = re.compile(r".*\b(embedding|tok_embeddings|head|output)\b.*")
Parameter = tuple[str, tuple[int, ...]]  # key in the model file, shape


@dataclass(frozen=True)
class _Owner:
    """The optimizer file that holds a rank's part of a parameter."""

    file: str
    group: int
    start: int  # in the group's flat tensors
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _File:
    name: str
    tp: int
    wp: int
    pp: int
    rank: int  # zero rank, for isp the data rank


class LegacyOptimizer:
    """Masters and moments of a folder's parameters. Raises UserError for what is missing or does not fit together."""

    def __init__(self, folder: LegacyFolder) -> None:
        self.folder = folder
        found = [(name, _FILE.fullmatch(name)) for name in folder.names]
        self.files = [
            _File(name, int(m["tp"]), int(m["wp"] or 0), int(m["pp"]), int(m["rank"])) for name, m in found if m
        ]
        if not self.files:
            raise UserError(
                f'{folder.path} holds no optimizer_*.pt: leave "optimizer" out of ckpt.load_ckpt_info.content'
            )
        # (stage, axis, rank on it, key): isp cuts blocks between weight ranks and the rest between tensor ranks
        self._owners: dict[tuple[int, str, int, str], _Owner] = {}
        self._experts: dict[tuple[int, int], list[tuple[int, str, tuple[int, ...]]]] = {}  # by stage and tensor rank
        for file in self.files:
            self._index(file)

    def tensor(self, file: ModelFile, key: str, kind: str, by_tensor: bool) -> Tensor:
        """The part of a parameter that the rank of a model file had: fp32, of the model file's shape.

        `kind` is master, exp_avg or exp_avg_sq; moments are zero before the first update.
        """
        axis = "tp" if by_tensor or not self.folder.is_isp else "wp"
        rank = getattr(file, axis)
        owner = self._owners.get((file.pp, axis, rank, key))
        if owner is None:
            raise UserError(
                f"{self.folder.path}: no optimizer file of stage {file.pp}, {axis}{rank} holds {key}; a zero rank's "
                "file is missing (InternLM 0.1 wrote too few with tensor parallel)"
            )
        states = self.folder.read_file(owner.file)
        flat = whole = states["flat_fp32_weights"][owner.group]
        if kind != "master":
            state = _adam_state(states, owner.group)
            if kind not in state:
                return torch.zeros(owner.shape)
            flat = state[kind]
        if not isinstance(flat, Tensor) or flat.shape != whole.shape:
            raise UserError(
                f"{self.folder.path}/{owner.file}: {kind} of group {owner.group} is not as long as its masters, "
                f"{whole.numel()} elements; the file is damaged"
            )
        return flat.detach()[owner.start : owner.start + prod(owner.shape)].view(owner.shape)

    def scalars(self) -> tuple[int, dict[str, float]]:
        """(Adam's number of updates, state of the loss scaler)."""
        states = self.folder.read_file(self.files[0].name)
        scaler = self.folder.part(self.files[0].name, states, "grad_scaler", dict)
        steps = [int(state["step"]) for state in states["base_optim_states"]["state"].values() if "step" in state]
        keys = ("_scale", "_growth_step", "_hysteresis_step")
        kinds = (int, float, Tensor)
        return max(steps, default=0), {
            key: float(self.folder.part(f"{self.files[0].name}: grad_scaler", scaler, key, kinds)) for key in keys
        }

    # -- who holds what -----------------------------------------------------------------------------------------

    def _index(self, file: _File) -> None:
        """Notes what one optimizer file holds."""
        states = self.folder.read_file(file.name)
        flats: dict[int, Tensor] = self.folder.part(file.name, states, "flat_fp32_weights", dict)
        adam = self.folder.part(file.name, states, "base_optim_states", dict)
        self.folder.part(f"{file.name}: base_optim_states", adam, "state", dict)
        groups = self.folder.part(f"{file.name}: base_optim_states", adam, "param_groups", list)
        names = [str(group.get("name", "default")) for group in groups]
        members = self._members(file, names, states.get("zero_devide_optim_plan"))
        plan = self._plan(file, states, names, members)
        if len(plan) != len(names):
            raise UserError(
                f"{self.folder.path}/{file.name}: its plan is of {len(plan)} groups of parameters, its Adam of "
                f"{len(names)}; the two are of different runs"
            )
        for group, per_rank in enumerate(plan):
            ordered = sorted(members[group], key=lambda parameter: -prod(parameter[1]))
            rank = self._zero_rank(file, names[group], len(per_rank))
            if per_rank and rank >= len(per_rank):
                raise UserError(
                    f"{self.folder.path}/{file.name} is of zero rank {rank} of group {names[group]}, its plan has "
                    f"{len(per_rank)}; the file is of another run"
                )
            end = 0
            for identity in per_rank[rank] if per_rank else []:
                key, shape = self._resolve(file, str(identity), ordered)
                owner = _Owner(file.name, group, end, shape)
                for axis in ("tp", "wp"):
                    self._owners.setdefault((file.pp, axis, getattr(file, axis), key), owner)
                end += prod(shape)
            held = flats[group].numel() if isinstance(flats.get(group), Tensor) else 0
            if end != held:
                raise UserError(
                    f"{self.folder.path}/{file.name}: group {names[group]} holds {held} elements, its plan says {end}"
                )

    def _members(self, file: _File, names: Sequence[str], plan: list[list[list[str]]] | None) -> list[list[Parameter]]:
        """The parameters of each group in the order of the model.

        Of a model that is fp32 altogether some versions had the parameters in `default`, with an empty group `fp32`.
        """
        place = names.index("fp32") if "fp32" in names else len(names)
        has_fp32 = "fp32" in names and (plan is None or any(map(any, plan[place : place + 1])))
        same = [m for m in self.folder.files if (m.tp, m.wp, m.pp) == (file.tp, file.wp, file.pp)]
        if not same:
            raise UserError(f"{self.folder.path} lacks the model file of the rank that wrote {file.name}")
        members: list[list[Parameter]] = [[] for _ in names]
        for key, value in self.folder.read_file(same[0].name).items():
            if _BUFFER.fullmatch(key):
                continue
            group = 0
            if "embed_head" in names and _EMBED_OR_HEAD.fullmatch(key):
                group = names.index("embed_head")
            elif "gate" in names and ".moe_layer.gate." in key:
                group = names.index("gate")
            elif "norm" in names and _NORM.fullmatch(key):
                group = names.index("norm")
            elif has_fp32 and value.dtype == torch.float32:
                group = names.index("fp32")
            members[group].append((key, tuple(value.shape)))
        for group, name in enumerate(names):
            if of_experts := _EXPERTS.fullmatch(name):
                members[group] = self._held_experts(file, int(of_experts[1]))
        return members

    def _held_experts(self, file: _File, expert_size: int) -> list[Parameter]:
        """Those of the data rank that wrote the file, which with experts is the zero rank."""
        place = (file.pp, file.tp)
        if place not in self._experts:
            self._experts[place] = self.folder.experts_of(*place)
        num_held = self.folder.num_experts // expert_size
        first = file.rank % expert_size * num_held
        held = range(first, first + num_held)
        return [(key, shape) for expert, key, shape in self._experts[place] if expert in held]

    def _plan(
        self, file: _File, states: dict[str, Any], names: Sequence[str], members: list[list[Parameter]]
    ) -> list[list[list[str]]]:
        """Per group and zero rank the parameters' ids."""
        if "zero_devide_optim_plan" in states:
            return states["zero_devide_optim_plan"]
        pattern = re.compile(rf"gpus-\d+_pp-{file.pp}_tp-{file.tp}_zo-{file.rank}\.pt")
        apart = [name for name in self.folder.names if pattern.fullmatch(name)]
        if apart:
            return self.folder.read_file(apart[0])
        logger.info(f"{file.name} has no plan of who owned what: the rule of 2023 is applied, and sizes are compared")
        ranks = sum((other.tp, other.pp) == (file.tp, file.pp) for other in self.files)
        return [
            _deal_out(group, ranks // int(of_experts[1]) if (of_experts := _EXPERTS.fullmatch(name)) else ranks)
            for name, group in zip(names, members, strict=True)
        ]

    def _zero_rank(self, file: _File, group: str, ranks: int) -> int:
        """Which of a group's zero ranks wrote the file. isp files are named by data rank; every rank wrote one."""
        if of_experts := _EXPERTS.fullmatch(group):
            return file.rank // int(of_experts[1])
        if not self.folder.is_isp or not ranks:
            return file.rank
        if group == "embed_head":
            return file.rank % ranks
        rank_in_stage = file.rank * self.folder.tensor_size + file.tp
        return rank_in_stage // self.folder.weight_size % ranks

    def _resolve(self, file: _File, identity: str, ordered: Sequence[Parameter]) -> Parameter:
        number, *dims = (int(part) if part.isdecimal() else -1 for part in identity.split("_"))
        if not 0 <= number < len(ordered) or ordered[number][1] != tuple(dims):
            raise UserError(
                f"{self.folder.path}/{file.name}: its plan names parameter {identity}, which the model file of the "
                "same rank doesn't have at that place; the two are of different runs"
            )
        return ordered[number]


def _adam_state(states: dict[str, Any], group: int) -> dict[str, Tensor]:
    optimizer = states["base_optim_states"]
    numbers = optimizer["param_groups"][group].get("params")
    return optimizer["state"].get(numbers[0], {}) if numbers else {}


def _deal_out(parameters: Sequence[Parameter], ranks: int) -> list[list[str]]:
    """The rule of 2023: largest first, each to the rank with the fewest elements so far, the lowest of equals."""
    ordered = sorted(parameters, key=lambda parameter: -prod(parameter[1]))
    owned: list[list[str]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for number, (_, shape) in enumerate(ordered):
        rank = sizes.index(min(sizes))
        owned[rank].append("_".join(str(part) for part in (number, *shape)))
        sizes[rank] += prod(shape)
    return owned
