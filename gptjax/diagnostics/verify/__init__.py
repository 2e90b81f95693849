"""Promise 1, proved on the devices at hand: every mesh and setting gives the numbers of one device."""
