"""The device mesh, the sharding of arrays over it, and the processes of a job."""
