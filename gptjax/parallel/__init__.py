"""The device mesh, how arrays lie on it, and the processes of a job."""
