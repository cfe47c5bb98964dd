"""From files to packed rows: formats -> packing -> order (sampler, mixture) -> loader."""
