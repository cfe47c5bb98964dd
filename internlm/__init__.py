"""internlm: trains large language models, from one laptop core to thousands of GPUs."""

__version__ = "1.0.0.dev0"
