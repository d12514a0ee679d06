"""Operations on parameters: low-rank perturbations, shared bases, and what layers receive."""
