"""torch.library registration: a file per op, in the order schema, fake, CPU, other devices, autograd."""
