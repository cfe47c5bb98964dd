"""Problems of how the ranks are laid out: sizes of the axes against the model, the batch and each other.

Every check yields one line a problem, as in checks.py: keys, values, the arithmetic, and what to change.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from math import gcd

from internlm.config.batch_texts import parse_ramp
from internlm.config.schema import V_SCHEDULES, Config, DataConfig, ModelConfig, ParallelConfig
from internlm.utils.errors import UserError

Problems = Iterator[str]


def find_layout_problems(config: Config, world_size: int | None) -> list[str]:
    """All of them; those of the number of ranks only when it is given."""
    found = [problem for one in LAYOUT_CHECKS for problem in one(config)]
    return found + [problem for one in WORLD_CHECKS for problem in one(config, world_size)]


def divisors(number: int) -> str:
    """ "1, 2, 3, 6" for 6."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def not_divided(what: str, number: int, by: str, size: int) -> str:
    """The arithmetic of a division that leaves a remainder."""
    return (
        f"{what} = {number} is not divisible by {by} = {size} ({number} = {number // size} * {size} + {number % size})"
    )


def sizes(config: Config) -> Problems:
    parallel = config.parallel
    for key in ("tensor", "pipeline", "expert"):
        size = getattr(parallel, key).size
        if size < 1:
            yield f"parallel.{key}.size = {size}: expected a number of ranks, 1 or more"


def tensor(config: Config) -> Problems:
    """What is cut between tensor ranks comes in equal parts."""
    parallel, model, data = config.parallel, config.model, config.data
    ranks, key = parallel.axis_sizes["tensor"], "parallel.tensor.size"
    if ranks < 2:
        return
    for what, number, unit in (
        ("model.num_kv_attention_heads", model.num_kv_heads, "each rank computes whole key/value heads"),
        (*_cut_columns(model), "each rank computes an equal number of feed-forward columns"),
        ("model.vocab_size", model.vocab_size, "each rank holds an equal number of rows of embedding and head"),
    ):
        if number % ranks:
            yield f"{not_divided(what, number, key, ranks)}; {unit}. Set {key} to one of {divisors(number)}"
    if model.fp8:
        yield f"model.fp8 = True: the products of {key} = {ranks} tensor ranks have no 8-bit form; turn one off"
    parts = parallel.axis_sizes["ring"] * parallel.axis_sizes["ulysses"]
    row = data.seq_len * data.micro_bsz // parts
    if parallel.tensor.mode != "mtp" and row % ranks:
        yield (
            f"{not_divided('tokens of a row on one rank', row, key, ranks)}; parallel.tensor.mode = "
            f'"{parallel.tensor.mode}" deals them out. Set data.seq_len to {_fitting(config, ranks)}, or mode to "mtp"'
        )


def context(config: Config) -> Problems:
    """A row is cut into equal parts, and Ulysses ranks get whole query heads."""
    parallel, model, data = config.parallel, config.model, config.data
    ring, ulysses, tensor = (parallel.axis_sizes[axis] for axis in ("ring", "ulysses", "tensor"))
    if tensor < 1 or ulysses < 1:
        return  # `sizes` reports it
    key, it = _ulysses_key(parallel)
    tokens, row, fitting = data.seq_len * data.micro_bsz, "data.seq_len * data.micro_bsz", _fitting(config)
    if ring > 1 and tokens % (2 * ring):
        yield (
            f"{not_divided(row, tokens, '2 * parallel.context.ring', 2 * ring)}; each ring rank computes one early and "
            f"one late chunk of a row. Set data.seq_len to {fitting}"
        )
    elif tokens // ring % ulysses:
        yield (
            f"{not_divided('tokens of a row on a ring rank', tokens // ring, key, ulysses)}; each rank computes an "
            f"equal number. Set data.seq_len to {fitting}"
        )
    if ring > 1 and model.attn_backend != "auto":
        yield (
            f'model.attn_backend = "{model.attn_backend}" with parallel.context.ring = {ring}: a ring has kernels of '
            'its own, for some of the keys at a time; set "auto", or cut rows by parallel.context.ulysses'
        )
    heads = model.num_attention_heads // tensor
    if heads % ulysses:
        yield (
            f"{not_divided('query heads of a tensor rank', heads, key, ulysses)}; around attention each rank computes "
            f"whole heads. Set {it} to one of {divisors(heads)}, and cut rows further by parallel.context.ring"
        )


def _ulysses_key(parallel: ParallelConfig) -> tuple[str, str]:
    """What says how many ulysses ranks there are, and what to call it: `isp` multiplies two keys."""
    if parallel.tensor.mode != "isp":
        return "parallel.context.ulysses", "it"
    if parallel.context.ulysses == 1:
        return "parallel.tensor.size (isp)", "it"
    factors = f"parallel.context.ulysses {parallel.context.ulysses} * parallel.tensor.size {parallel.tensor.size} (isp)"
    return factors, "their product"


def _fitting(config: Config, tensor: int = 1) -> int:
    """The next data.seq_len whose rows come in equal parts, to be dealt out to so many tensor ranks as well."""
    ring, ulysses = (config.parallel.axis_sizes[axis] for axis in ("ring", "ulysses"))
    parts = ring * ulysses * tensor * (2 if ring > 1 else 1)
    return (config.data.seq_len + parts - 1) // parts * parts


def chunks(config: Config) -> Problems:
    """Schedule and blocks of a pipeline's chunks."""
    pipeline, model = config.parallel.pipeline, config.model
    stages, per_stage, schedule = pipeline.size, config.chunks_per_stage, config.pipeline_schedule
    if stages < 2:
        if model.num_chunks > 1:
            yield (
                f"model.num_chunks = {model.num_chunks} needs parallel.pipeline.size > 1, which is {stages}; raise "
                "that, or set model.num_chunks = 1"
            )
        for name, default in (("schedule", "auto"), ("split", "even")):
            value = getattr(pipeline, name)
            if value not in (default, "1f1b", "flops"):  # these say nothing else of one stage
                needs = f"needs parallel.pipeline.size > 1, which is {stages}"
                yield f'parallel.pipeline.{name} = {value} {needs}; raise that, or set "{default}"'
        return
    key = f'parallel.pipeline.schedule = "{schedule}"'
    if schedule == "interleaved" and per_stage == 1:
        yield f'{key} needs model.num_chunks > 1, which is 1; raise it, or set "1f1b"'
    elif schedule == "1f1b" and per_stage > 1:
        yield f'{key} has one chunk per stage, but model.num_chunks = {per_stage}; set "interleaved", or num_chunks = 1'
    elif schedule in V_SCHEDULES and model.num_chunks not in (1, 2):
        yield f"{key} has two chunks per stage, but model.num_chunks = {model.num_chunks}; set 2 or leave it out"
    count = stages * per_stage
    chunks_text = f"parallel.pipeline.size {stages} * {per_stage} chunks per stage = {count} chunks"
    if isinstance(pipeline.split, tuple):
        if len(pipeline.split) != count:
            yield (
                f"parallel.pipeline.split has {len(pipeline.split)} numbers of blocks, for {chunks_text}; give {count} "
                'numbers, or "even"'
            )
        if sum(pipeline.split) != model.num_layers:
            terms = " + ".join(map(str, pipeline.split))
            total = f"{terms} = {sum(pipeline.split)}"
            yield (
                f"parallel.pipeline.split = {total} blocks, but model.num_layers = {model.num_layers}; give numbers "
                f'that add up to {model.num_layers}, or "even"'
            )
    elif model.num_layers < count:
        yield f"model.num_layers = {model.num_layers} is less than a block for each of {chunks_text}; lower one of them"
    elif schedule == "interleaved" and pipeline.split == "even" and model.num_layers % per_stage:
        yield (
            f"{not_divided('model.num_layers', model.num_layers, 'model.num_chunks', per_stage)}; set one of "
            f'{divisors(model.num_layers)}, or parallel.pipeline.split = "flops"'
        )


def pipeline_batches(config: Config) -> Problems:
    """Enough micro batches for every stage to have work, during the ramp-up too."""
    stages, schedule, data = config.parallel.pipeline.size, config.pipeline_schedule, config.data
    if stages < 2:
        return
    needed = 2 * stages if schedule == "dualpipev" else stages
    for count in _micro_nums(data):
        rising = count < data.micro_num
        found = f"data.rampup_batch_size = {data.rampup_batch_size!r} has steps of" if rising else "data.micro_num ="
        if count < needed:
            yield (
                f'{found} {count} micro batches, but "{schedule}" on parallel.pipeline.size = {stages} stages needs '
                f"{needed}; {'let it start with' if rising else 'set'} {needed} or more"
            )
        elif schedule == "interleaved" and count % (count // stages):
            rounds, below = count // stages, count // stages * stages
            fix = f"let START and INCR be multiples of {stages}" if rising else f"set {below} or {below + stages}"
            yield (
                f'{found} {count} micro batches, but "interleaved" has equal rounds of parallel.pipeline.size = '
                f"{stages} or more, and {count} = {rounds} * {count // rounds} + {count % rounds}; {fix}"
            )


def _micro_nums(data: DataConfig) -> list[int]:
    """All numbers of micro batches that a step of the run has."""
    with suppress(UserError):  # checks.py reports it
        ramp = parse_ramp(data.rampup_batch_size)
        if ramp is not None:
            return [*range(ramp.start, data.micro_num, ramp.increment), data.micro_num]
    return [data.micro_num]


def _cut_columns(model: ModelConfig) -> tuple[str, int]:
    """The width that tensor ranks cut: routed experts stay whole, shared ones don't."""
    if model.num_experts == 1:
        return "model.intermediate_size", model.ffn_size
    return "width of shared experts", model.expert_size * model.moe.num_shared_experts


def expert(config: Config) -> Problems:
    """Experts are dealt out in equal parts, among the ranks of a stage."""
    parallel, model = config.parallel, config.model
    ranks, key = parallel.expert.size, "parallel.expert.size"
    if model.num_experts == 1:
        if ranks > 1:
            yield f"{key} = {ranks}, but model.num_experts = 1 has none to deal out; set it to 1"
        return
    if ranks > 0 and model.num_experts % ranks:
        what = not_divided("model.num_experts", model.num_experts, key, ranks)
        yield f"{what}; each rank holds an equal number. Set {key} to one of {divisors(model.num_experts)}"
    tensor, parts = (
        parallel.axis_sizes["tensor"],
        parallel.axis_sizes["ring"] * parallel.axis_sizes["ulysses"],
    )
    if tensor < 1 or parts < 1:
        return  # `sizes` reports it
    tokens = config.data.seq_len * config.data.micro_bsz // parts
    if parallel.tensor.mode == "mtp" and tensor > 1 and tokens % tensor:
        yield (
            f"{not_divided('tokens of a row on one rank', tokens, 'parallel.tensor.size', tensor)}; tensor ranks deal "
            f"them out before experts compute them. Set data.seq_len to {_fitting(config, tensor)}"
        )


def _axes_text(parallel: ParallelConfig) -> str:
    """ "pipeline 2 * tensor 4", of the axes of more than one rank."""
    return " * ".join(f"{axis} {size}" for axis, size in parallel.axis_sizes.items() if size > 1) or "1"


def world(config: Config, world_size: int | None) -> Problems:
    """The axes of the model must fit into the ranks that there are; data takes the rest."""
    parallel, needed = config.parallel, 1
    for size in parallel.axis_sizes.values():
        needed *= size
    if world_size is None or needed < 1 or world_size % needed == 0:
        return
    rest = f"= {world_size // needed} * {needed} + {world_size % needed}"
    yield (
        f"{world_size} ranks are not divisible by {_axes_text(parallel)} = {needed} of `parallel` "
        f"({world_size} {rest}); start a multiple of {needed} ranks, or lower a size"
    )


def expert_world(config: Config, world_size: int | None) -> Problems:
    """Stages and groups of ranks that hold all experts must fit into the ranks that there are."""
    stages, ranks = config.parallel.pipeline.size, config.parallel.expert.size
    if world_size is None or stages < 1 or ranks < 1 or world_size % stages:
        return
    in_stage = world_size // stages
    if in_stage % ranks:
        fitting = gcd(in_stage, config.model.num_experts)
        what = not_divided(
            f"ranks of a stage ({world_size} / pipeline {stages})", in_stage, "parallel.expert.size", ranks
        )
        yield f"{what}; they hold all experts as many times over. Set it to one of {divisors(fitting)}"


def zero_sizes(config: Config, world_size: int | None) -> Problems:
    """The divisor chain p | g | os | dp; -1 stands for dp, which is unknown without a world size."""
    parallel, dp = config.parallel, None
    shared = parallel.axis_sizes["pipeline"] * parallel.axis_sizes["tensor"]
    if world_size is not None:
        if shared < 1 or world_size % shared:
            return  # `world` or `sizes` reports it
        dp = world_size // shared
    chain: list[tuple[str, int]] = []
    for key in ("weight", "gradient", "zero1"):
        size = getattr(parallel, key).size
        if size < 1 and size != -1:
            yield f"parallel.{key}.size = {size}: expected a number of ranks, or -1 for all data ranks"
            return
        if size != -1:
            chain.append((f"parallel.{key}.size", size))
        elif dp is not None:
            chain.append((f"parallel.{key}.size", dp))
        elif key != "zero1" and parallel.zero1.size != -1:
            os = parallel.zero1.size
            yield f"parallel.{key}.size = -1 is all data ranks, but parallel.zero1.size = {os}; set that to -1 too"
    if dp is not None:
        tensor, pipeline = parallel.axis_sizes["tensor"], parallel.pipeline.size
        chain.append((f"the data-parallel size (world {world_size} / tensor {tensor} / pipeline {pipeline})", dp))
    for (inner, a), (outer, b) in pairwise(chain):
        if b % a:
            yield (
                f"{inner} = {a} does not divide {outer} = {b} ({b} = {b // a} * {a} + {b % a}); sizes form a chain "
                f"weight | gradient | zero1 | data ranks. Set {inner} to one of {divisors(b)}"
            )


LAYOUT_CHECKS: tuple[Callable[[Config], Problems], ...] = (
    sizes,
    tensor,
    context,
    chunks,
    pipeline_batches,
    expert,
)
WORLD_CHECKS: tuple[Callable[[Config, int | None], Problems], ...] = (world, expert_world, zero_sizes)
