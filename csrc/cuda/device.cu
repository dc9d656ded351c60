// What the extension knows of a device: a choice of backend is made by it.
#include "device.h"
#include "launchers.h"

namespace rapidin {

int shared_memory_limit(int device) { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

int multiprocessors_of(int device) { return device_attribute(cudaDevAttrMultiProcessorCount, device); }

int capability_of(int device) {
    return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
           device_attribute(cudaDevAttrComputeCapabilityMinor, device);
}

}  // namespace rapidin
