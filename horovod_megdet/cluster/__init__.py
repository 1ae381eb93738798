"""What runs around training on many machines: launching it, examining the machines, and watching over the ranks."""
