# Finds nvcc and CUTLASS before the CUDA language is enabled. Sets CUDA_ROOT, CUDART_STATIC,
# CUTLASS_INCLUDE_DIR and CUTLASS_VERSION.

# First folder of the build Python that matches: PyPI packages of a build environment lie there.
function(find_in_python_packages package pattern result)
  set(script "import glob, importlib.util, os
spec = importlib.util.find_spec('${package}')
hits = [h for p in (spec.submodule_search_locations if spec else []) for h in glob.glob(os.path.join(p, '${pattern}'))]
print(hits[0] if hits else '')")
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "${script}" OUTPUT_VARIABLE hit
                  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(${result} "${hit}" PARENT_SCOPE)
endfunction()

if(HOPPER_FA_CUDA_ROOT)
  set(nvcc "${HOPPER_FA_CUDA_ROOT}/bin/nvcc")
else()
  find_in_python_packages(nvidia "cu1[3-9]/bin/nvcc" nvcc)
  if(NOT nvcc)
    unset(nvcc)  # find_program leaves alone what is set
    find_program(nvcc nvcc HINTS "$ENV{CUDA_HOME}/bin" PATHS /usr/local/cuda/bin NO_CACHE)
  endif()
endif()
if(NOT nvcc OR NOT EXISTS "${nvcc}")
  message(FATAL_ERROR "No CUDA compiler (found: '${nvcc}'). Install the build requirements of pyproject.toml "
                      "(nvidia-cuda-nvcc and its set), or set HOPPER_FA_CUDA_ROOT to a CUDA toolkit folder.")
endif()
# NOTE: a wrapper script or link on PATH is no toolkit; nvcc itself says where it lives.
execute_process(COMMAND "${nvcc}" --dryrun --cuda -x cu /dev/null -o /dev/null ERROR_VARIABLE dryrun OUTPUT_QUIET)
if(NOT dryrun MATCHES "_HERE_=([^\n]+)")
  message(FATAL_ERROR "'${nvcc}' does not run: ${dryrun}")
endif()
get_filename_component(CUDA_ROOT "${CMAKE_MATCH_1}/.." REALPATH)
set(CMAKE_CUDA_COMPILER "${CUDA_ROOT}/bin/nvcc")
# NOTE: ptxas before 13.3 lets instructions write registers that a running WGMMA may still read, without a message.
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE nvcc_version COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" nvcc_version "${nvcc_version}")
set(nvcc_version "${CMAKE_MATCH_1}")
if(nvcc_version VERSION_LESS 13.3)
  message(FATAL_ERROR "nvcc of '${CUDA_ROOT}' is release ${nvcc_version}, but it must be 13.3 or newer: older ones compile "
                      "WGMMA wrong (a register hazard). Install the build requirements of pyproject.toml, or set "
                      "HOPPER_FA_CUDA_ROOT to a newer toolkit.")
endif()

find_library(CUDART_STATIC cudart_static REQUIRED NO_CACHE NO_DEFAULT_PATH PATHS "${CUDA_ROOT}"
             PATH_SUFFIXES lib64 lib "targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib")

if(HOPPER_FA_CUTLASS_DIR)
  set(CUTLASS_INCLUDE_DIR "${HOPPER_FA_CUTLASS_DIR}/include")
else()
  find_in_python_packages(cutlass_library "source/include" CUTLASS_INCLUDE_DIR)
endif()
if(NOT EXISTS "${CUTLASS_INCLUDE_DIR}/cutlass/version.h")
  message(FATAL_ERROR "No CUTLASS headers: '${CUTLASS_INCLUDE_DIR}' holds no cutlass/version.h. Install nvidia-cutlass, "
                      "or set HOPPER_FA_CUTLASS_DIR to a CUTLASS 4 checkout.")
endif()
file(READ "${CUTLASS_INCLUDE_DIR}/cutlass/version.h" version_header)
string(REGEX REPLACE ".*CUTLASS_MAJOR ([0-9]+).*CUTLASS_MINOR ([0-9]+).*CUTLASS_PATCH ([0-9]+).*" "\\1.\\2.\\3"
       CUTLASS_VERSION "${version_header}")
