"""Layouts of 2, 4 and 8 ranks, by name: what the matrices of tests are made of."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Ranks, the config's `parallel` section, and further sections that it needs."""

    ranks: int
    parallel: dict[str, Any]
    sections: dict[str, Any] = field(default_factory=dict)


def zero(p: int, g: int, os: int) -> dict[str, Any]:
    return {"weight": {"size": p}, "gradient": {"size": g}, "zero1": {"size": os}}


def tensor(size: int, mode: str = "mtp") -> dict[str, Any]:
    return {"tensor": {"size": size, "mode": mode}}


def context(ring: int = 1, ulysses: int = 1) -> dict[str, Any]:
    return {"context": {"ring": ring, "ulysses": ulysses}}


def pipeline(size: int, schedule: str = "1f1b") -> dict[str, Any]:
    return {"pipeline": {"size": size, "schedule": schedule}}


def experts(size: int) -> dict[str, Any]:
    return {"expert": {"size": size}}


FOUR: dict[str, Any] = {"model": {"num_layers": 4}}  # blocks, for two stages with two chunks each
TIED: dict[str, Any] = {"model": {**FOUR["model"], "tie_word_embeddings": True}}
CHUNKS = {"model": {"num_chunks": 2}}
MOE: dict[str, Any] = {
    "model": {"num_experts": 8, "moe": {"top_k": 2, "bias_rate": 0.01}},
    "loss": {"moe_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01},
}

# Kinds of layouts of a dense model, whose embedding a pipeline has at both ends, and of one with experts.
DENSE: dict[str, Layout] = {
    "one": Layout(1, {}, TIED),
    "dualpipev-msp2": Layout(4, {**pipeline(2, "dualpipev"), **tensor(2, "msp")}, TIED),
    "pp2-interleaved": Layout(2, pipeline(2, "interleaved"), {"model": {**TIED["model"], **CHUNKS["model"]}}),
    "zero3": Layout(4, zero(4, 4, 4), TIED),
    "mtp2": Layout(2, tensor(2), TIED),
    "hfsdp": Layout(4, zero(2, 2, 4), TIED),
    "ring2-ulysses2": Layout(4, context(2, 2), TIED),
    "zbv-ddp": Layout(4, pipeline(2, "zbv"), TIED),
    "fsp2-zero3": Layout(4, {**tensor(2, "fsp"), **zero(2, 2, 2)}, TIED),
    "ring2-msp2": Layout(4, {**context(ring=2), **tensor(2, "msp")}, TIED),
}
EXPERTS: dict[str, Layout] = {
    "moe-one": Layout(1, {}, MOE),
    "moe-ep2-zero3": Layout(4, {**experts(2), **zero(2, 2, 4)}, MOE),
    "moe-ep4-mtp2": Layout(4, {**experts(4), **tensor(2)}, MOE),
    "moe-ep2-pp2": Layout(4, {**experts(2), **pipeline(2)}, MOE),
}
LAYOUTS = {**DENSE, **EXPERTS}

# Every axis alone, on two and on four ranks.
CHUNKS_OF = {"1f1b": 1, "interleaved": 2, "zbv": 2, "dualpipev": 2}


def alone(ranks: int) -> dict[str, Layout]:
    return {
        f"ddp-{ranks}": Layout(ranks, zero(1, 1, 1)),
        f"zero1-{ranks}": Layout(ranks, zero(1, 1, ranks)),
        f"zero2-{ranks}": Layout(ranks, zero(1, ranks, ranks)),
        f"zero3-{ranks}": Layout(ranks, zero(ranks, ranks, ranks)),
        **{f"{mode}-{ranks}": Layout(ranks, tensor(ranks, mode)) for mode in ("mtp", "msp", "fsp", "isp")},
        f"ulysses-{ranks}": Layout(ranks, context(ulysses=ranks)),
        f"ring-{ranks}": Layout(ranks, context(ring=ranks)),
        **{
            f"{schedule}-{ranks}": Layout(
                ranks,
                pipeline(ranks, schedule),
                {"model": {"num_layers": chunks * ranks, "num_chunks": chunks if schedule == "interleaved" else 1}},
            )
            for schedule, chunks in CHUNKS_OF.items()
        },
        f"experts-{ranks}": Layout(ranks, experts(ranks), MOE),
    }


ALONE: dict[str, Layout] = {
    **alone(2),
    **alone(4),
    "hsdp-4": Layout(4, zero(2, 2, 2)),
    "hfsdp-4": Layout(4, zero(2, 2, 4)),
    "gradients of two, states of four": Layout(4, zero(1, 2, 4)),
}

# All pairs of axes. Letters: P pipeline, D data, R ring, U Ulysses, T tensor, E experts.
MOE_FOUR: dict[str, Any] = {**MOE, "model": {**MOE["model"], **FOUR["model"]}}
PAIRS: dict[str, Layout] = {
    "P-D interleaved zero1": Layout(
        4, {**pipeline(2, "interleaved"), **zero(1, 1, 2)}, {"model": {**FOUR["model"], **CHUNKS["model"]}}
    ),
    "P-R dualpipev": Layout(4, {**pipeline(2, "dualpipev"), **context(ring=2)}, FOUR),
    "P-U zbv zero3": Layout(4, {**pipeline(2, "zbv"), **context(ulysses=2), **zero(2, 2, 2)}, FOUR),
    "P-T 1f1b fsp": Layout(4, {**pipeline(2), **tensor(2, "fsp")}, FOUR),
    "P-E dualpipev": Layout(4, {**pipeline(2, "dualpipev"), **experts(2)}, MOE_FOUR),
    "D-R zero3": Layout(4, {**context(ring=2), **zero(4, 4, 4)}),
    "D-U ddp": Layout(4, {**context(ulysses=2), **zero(1, 1, 1)}),
    "D-T msp zero2": Layout(4, {**tensor(2, "msp"), **zero(1, 2, 2)}),
    "D-E zero2": Layout(4, {**experts(2), **zero(1, 4, 4)}, MOE),
    "R-U states of four": Layout(4, {**context(2, 2), **zero(1, 2, 4)}),
    "R-T fsp": Layout(4, {**context(ring=2), **tensor(2, "fsp")}),
    "R-E": Layout(2, {**context(ring=2), **experts(2)}, MOE),
    "U-T mtp zero3": Layout(4, {**context(ulysses=2), **tensor(2), **zero(2, 2, 2)}),
    "U-E": Layout(2, {**context(ulysses=2), **experts(2)}, MOE),
    "T-E fsp": Layout(2, {**tensor(2, "fsp"), **experts(2)}, MOE),
}

# Twelve of three and four axes of eight ranks.
DENSE_TOGETHER: dict[str, Layout] = {
    "P-D-T interleaved fsp zero3": Layout(
        8, {**pipeline(2, "interleaved"), **tensor(2, "fsp"), **zero(2, 2, 2)}, CHUNKS
    ),
    "P-U-T 1f1b msp zero2": Layout(8, {**pipeline(2), **context(ulysses=2), **tensor(2, "msp"), **zero(1, 2, 2)}),
    "P-D-R zbv hfsdp": Layout(8, {**pipeline(2, "zbv"), **context(ring=2), **zero(2, 2, 4)}),
    "P-D-U dualpipev hsdp": Layout(8, {**pipeline(2, "dualpipev"), **context(ulysses=2), **zero(2, 2, 2)}),
    "P-R-U interleaved ddp": Layout(8, {**pipeline(2, "interleaved"), **context(2, 2), **zero(1, 1, 1)}, CHUNKS),
    "P-R-T zbv fsp zero1": Layout(8, {**pipeline(2, "zbv"), **context(ring=2), **tensor(2, "fsp"), **zero(1, 1, 2)}),
    "R-U-T mtp zero3": Layout(8, {**context(2, 2), **tensor(2), **zero(4, 4, 4)}),
}
MOE_TOGETHER: dict[str, Layout] = {
    "D-U-T-E mtp zero1": Layout(8, {**context(ulysses=2), **tensor(2), **experts(4), **zero(1, 1, 4)}, MOE),
    "P-D-T-E 1f1b msp zero3": Layout(8, {**pipeline(2), **tensor(2, "msp"), **experts(2), **zero(2, 2, 2)}, MOE),
    "P-R-T-E interleaved mtp": Layout(
        8,
        {**pipeline(2, "interleaved"), **context(ring=2), **tensor(2), **experts(4)},
        {**MOE, "model": {**MOE["model"], **CHUNKS["model"]}},
    ),
    "P-D-U-E zbv zero2": Layout(8, {**pipeline(2, "zbv"), **context(ulysses=2), **experts(2), **zero(1, 2, 4)}, MOE),
    "D-R-U-E ddp": Layout(8, {**context(2, 2), **experts(8), **zero(1, 1, 1)}, MOE),
}
