"""Training and evaluation of networks: batches, losses, the optimisation loop, accuracies."""
