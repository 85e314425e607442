"""`esper bench stability`: what many grafts do to what a network knew, and what they mend."""
