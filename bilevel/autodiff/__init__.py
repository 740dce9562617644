"""What torch's automatic differentiation needs beside it: kernels, differences, random state."""
