// Argument structs of all CPU kernels.
#pragma once
#include "moesaic/selftest.h"
