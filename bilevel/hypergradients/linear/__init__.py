"""Linear systems with the Hessian of the lower loss, and what solves them."""
