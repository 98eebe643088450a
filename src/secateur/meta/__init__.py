"""The paper: network, objective and training of the meta-pruner."""
