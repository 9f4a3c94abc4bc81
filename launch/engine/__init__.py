"""DeepSpeed and the process groups behind one adapter: layout, hardware, profiling."""
