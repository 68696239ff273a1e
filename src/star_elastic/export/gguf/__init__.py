"""GGUF: one size of a checkpoint as the single file that llama.cpp runs.

Written with llama.cpp's own `gguf` package (extra `gguf`), whose tables give the names of tensors
and keys. Codes that package cannot make (K-quants) are made by llama.cpp itself, through
llama-cpp-python, if it is installed.
"""

from star_elastic.export.gguf.plan import Plan, make_plan
from star_elastic.export.gguf.types import Type, type_of
from star_elastic.export.gguf.write import Written, write_gguf

__all__ = ["Plan", "Type", "Written", "make_plan", "type_of", "write_gguf"]
