"""Controls the machine: devices, processes, compiled programs, memory and signals."""
