"""Many runs of one recipe: what is searched, who trains it, what came of it."""
