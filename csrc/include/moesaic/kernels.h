// Argument structs of all CPU kernels.
#pragma once
#include "moesaic/roofline.h"
#include "moesaic/selftest.h"
