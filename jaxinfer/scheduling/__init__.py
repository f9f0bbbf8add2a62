"""Which tokens of which sequences the next step computes, and in which pages: host code, no jax."""
