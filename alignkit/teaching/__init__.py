"""How is alignkit taught? Student versions of the notebooks, and a graded lab whose checks students do not see."""
