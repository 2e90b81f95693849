"""How the model's maths runs on a device: products, attention kernels, lookups. The room that asks which device it is."""
