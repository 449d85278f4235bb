"""What runs in the processes of other programs. It needs numpy, and what each module names; never flashinfer."""
