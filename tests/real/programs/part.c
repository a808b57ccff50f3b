#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <math.h>
static long table[64];
static long mix(long x) { for (int i = 0; i < 64; i++) { table[i] = x * (i + 3) % 8191; x ^= table[i] << 2; } return x; }
long NAME(void);
long NAME(void) { char text[32]; snprintf(text, sizeof text, "%ld", mix(NUMBER)); return NUMBER * (long)strlen(text) + mix(NUMBER) % 1000; }
