"""Per-example products ⟨μ, ∇ℓ_i⟩ and weighted gradients Σ w_i ∇ℓ_i from one backward pass.

While ``tracker.Tracker`` is active, every torch operation that takes a tracked parameter runs with
the parameter's value and has a tap on its output (``operations``). In the backward pass each tap
receives the gradient b of the *unweighted* loss, row by row. Input gradients flow on as usual, and
the tap computes from b the parameter's gradient weighted per example and the products (``uses``),
which the micro-batch's ``context.Context`` collects. No module is wrapped or hooked, so the loss
may be any pure function, such as ``bilevel.functional`` of any module.

Every operation of a parameter and of what is computed from the batch (``origin``) must have the
examples in its leading dimension, or the owners of its rows must be declared in
``ReweightingProblem.rows``. An operation of parameters and constants makes an image of the
parameters, which is used like them. An operation without a rule is an error that names it; it is
never omitted silently. Whether the result is right for this model is measured (``verification``).
"""
