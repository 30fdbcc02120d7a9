"use strict";

// Hands the microphone's samples to the page, in blocks of 128 as they come.
class Tap extends AudioWorkletProcessor {
  process(inputs) {
    if (inputs[0].length) this.port.postMessage(inputs[0][0].slice());
    return true;
  }
}

registerProcessor("tap", Tap);
