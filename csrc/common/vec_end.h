// Last in a file that began with vec.h: clang wants the instruction set handed back.
#if defined(DSCT_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
