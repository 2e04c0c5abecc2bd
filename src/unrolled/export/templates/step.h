/* Runs one step: x has INPUT numbers, y gets OUTPUT. */
void @name@_step(@name@_state *state, const @x@ *x, float *y);

