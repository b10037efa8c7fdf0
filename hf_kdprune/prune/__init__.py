"""The second loss and what it decides: sites, scores, plan, surgery, repair."""
