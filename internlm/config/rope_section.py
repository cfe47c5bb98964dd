"""How rotary angles are stretched so that a model reads longer texts than it was trained on."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from internlm.config.section import PositiveInt, Section

Positive = Annotated[float, Field(gt=0)]
# The keys that each type reads; those in the first half it needs.
_NEEDED = {"llama3": ("original_max_position_embeddings",), "yarn": ("original_max_position_embeddings",)}
_READ = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
}


class RopeScaling(Section):
    """Rotary scaling, under the names of Hugging Face's `rope_scaling`."""

    type: Literal["linear", "dynamic", "yarn", "llama3"] = Field(
        description="linear: positions divided by factor; dynamic: a larger base for texts longer than "
        "max_position_embeddings, in inference only; yarn: by parts (Peng et al., 2023); llama3: by parts as Llama 3.1"
    )
    factor: Annotated[float, Field(ge=1)] = Field(description="how many times longer texts may become")
    original_max_position_embeddings: PositiveInt | None = Field(
        None, description="yarn, llama3: longest position before stretching"
    )
    low_freq_factor: Positive = Field(1.0, description="llama3: pairs with fewer turns in the old length are divided")
    high_freq_factor: Positive = Field(4.0, description="llama3: pairs with more turns in the old length stay")
    beta_fast: Positive = Field(32.0, description="yarn: pairs with more turns in the old length stay")
    beta_slow: Positive = Field(1.0, description="yarn: pairs with fewer turns in the old length are divided")
    truncate: bool = Field(True, description="yarn: the borders between pairs are whole numbers")
    attention_factor: Positive | None = Field(
        None, description="yarn: factor of sines and cosines; None: 0.1 ln(factor) + 1"
    )
    mscale: Positive | None = Field(
        None, description="yarn: with mscale_all_dim, weight of ln(factor) in the numerator"
    )
    mscale_all_dim: Positive | None = Field(None, description="yarn: the same in the denominator")

    @model_validator(mode="after")
    def _fits_its_type(self) -> "RopeScaling":
        needed, read = _NEEDED.get(self.type, ()), _READ.get(self.type, ())
        if missing := [key for key in needed if getattr(self, key) is None]:
            raise ValueError(f"type {self.type!r} needs {', '.join(missing)}")
        given = self.model_dump(exclude_defaults=True).keys() - {"type", "factor", *needed, *read}
        if given:
            raise ValueError(f"type {self.type!r} doesn't read {', '.join(sorted(given))}; remove it")
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor} must be below {self.high_freq_factor}")
        return self

    def spelled_out(self) -> dict[str, float | int | str | bool]:
        """Type, factor, and the keys of the type that have a value: what Hugging Face files hold."""
        keys = ("factor", *_NEEDED.get(self.type, ()), *_READ.get(self.type, ()))
        values = {key: getattr(self, key) for key in keys}
        return {"rope_type": self.type, **{key: value for key, value in values.items() if value is not None}}
