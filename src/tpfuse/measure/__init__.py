"""Measuring on the machine at hand: what `tpfuse tune` and `tpfuse bench` share."""
