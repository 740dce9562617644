"""Other problems for the bilevel core, each a short recipe to read and to run.

``noisy_labels`` learns instance weights, ``logistic_regularization`` one penalty per feature, and
``learned_schedule`` the learning rate and decay of every step. None downloads anything.
"""
