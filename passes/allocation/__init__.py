"""One allocator for every pass that must meet a budget: amounts, budgets, and which Dim keeps how many indices."""
