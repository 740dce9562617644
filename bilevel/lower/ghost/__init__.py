"""Per-example products ⟨μ, ∇ℓ_i⟩ and weighted gradients Σ w_i ∇ℓ_i from one backward pass.

While ``tracker.Tracker`` is active, every torch operation that takes a tracked parameter runs with
the parameter's value and leaves a tap on its output (``operations``). The backward pass then brings
each tap the gradient b of the *unweighted* loss, row by row: input gradients flow on as usual,
and the tap turns b into the parameter's gradient weighted per example and into the products
(``uses``), which the micro-batch's ``context.Context`` gathers. No module is wrapped or hooked, so
any pure function will do, ``torch.func.functional_call`` of any module included.

Every operation with a parameter must have the examples in its leading dimension, or be declared
in ``ReweightingProblem.rows``; what has no rule is refused by name, never left out.
"""
