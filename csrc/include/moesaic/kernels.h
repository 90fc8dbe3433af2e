// Argument structs of all CPU kernels.
#pragma once
#include "moesaic/attention.h"
#include "moesaic/matmul.h"
#include "moesaic/moe.h"
#include "moesaic/quant.h"
#include "moesaic/roofline.h"
#include "moesaic/selftest.h"
