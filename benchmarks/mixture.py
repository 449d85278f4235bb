"""Synthetic mixtures of experts with planted router locality, for us and for llama.cpp; `README.md` has the method.

python benchmarks/mixture.py make SHAPE [--layers N] --store OUT.flash --gguf OUT-q4_0.gguf
python benchmarks/mixture.py text WORDS > TEXT
python benchmarks/mixture.py measure STORE [--text FILE] [--tokens 256] [--json]
"""

from planted.experts.cli import main

if __name__ == "__main__":
    main()
