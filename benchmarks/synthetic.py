"""Synthetic checkpoints whose forward pass shows planted statistics; method and results in `README.md` here.

python benchmarks/synthetic.py make SHAPE OUT [--activation relu|silu] [--layers N] [--sparsity 0.95] [--reuse 1]
python benchmarks/synthetic.py measure CHECKPOINT_OR_STORE [--text FILE] [--tokens 200] [--json]
python benchmarks/synthetic.py record STORE OUT [--text FILE] [--tokens 200]
python benchmarks/synthetic.py ids CHECKPOINT_OR_STORE [--text FILE] [--tokens 200]
"""

from planted.cli import main

if __name__ == "__main__":
    main()
