"""The model's maths on a device: products, attention kernels, lookups. The room that asks which device it is."""
