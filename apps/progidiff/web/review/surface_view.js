// A surface in a WebGL canvas, turned by dragging.

import { parseColor } from "./colors.js";

/** @typedef {import("./surface.js").Surface} Surface */
/** @typedef {{surface: Surface|null, size: readonly [x: number, y: number, z: number], color: string, level: number|null}} Scene size of the whole image in mm; `level` is the height of the slice that is shown, in mm from the lowest */

const VERTEX = `#version 300 es
in vec3 position; in vec3 normal; uniform mat4 view; out vec3 turned;
void main() { gl_Position = view * vec4(position, 1.0); turned = mat3(view) * normal; }`;
const FRAGMENT = `#version 300 es
precision mediump float; in vec3 turned; uniform vec4 color; out vec4 result;
void main() {
  float light = color.a < 1.0 ? 1.0 : 0.35 + 0.65 * abs(normalize(turned).z);
  result = vec4(color.rgb * light * color.a, color.a);
}`;
const GROUND = [0.02, 0.03, 0.04];
const PLANE_COLOR = [0.85, 0.9, 1, 0.35];
/** Seen from in front, a little from above. */
const FIRST_TURN = { around: 0.5, up: 0.25 };

export class SurfaceView {
  #canvas;
  /** @type {WebGL2RenderingContext|null} */
  #gl;
  /** @type {WebGLProgram|null} */
  #program = null;
  /** @type {{buffers: WebGLBuffer[], count: number}|null} */
  #mesh = null;
  /** @type {Scene} */
  #scene = { surface: null, size: [1, 1, 1], color: "#ffffff", level: null };
  #turn = { ...FIRST_TURN };
  #frame = 0;

  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.#canvas = canvas;
    this.#gl = canvas.getContext("webgl2", { antialias: true });
    this.#prepare();
    canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => {
      this.#prepare();
      this.show(this.#scene);
    });
    canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
    canvas.addEventListener("pointermove", (event) => {
      if (!event.buttons) return;
      this.#turn.around += event.movementX * 0.01;
      this.#turn.up = Math.min(1.5, Math.max(-1.5, this.#turn.up + event.movementY * 0.01));
      this.paint();
    });
  }

  /** Whether this browser can draw surfaces. */
  get canShow() {
    return this.#gl !== null;
  }

  #prepare() {
    const gl = this.#gl;
    if (!gl) return;
    const program = gl.createProgram();
    for (const [kind, text] of /** @type {const} */ ([[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]])) {
      const shader = /** @type {WebGLShader} */ (gl.createShader(kind));
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.bindAttribLocation(program, 0, "position");
    gl.bindAttribLocation(program, 1, "normal");
    gl.linkProgram(program);
    this.#program = program;
    this.#mesh = null;
  }

  /** @param {Scene} scene */
  show(scene) {
    const gl = this.#gl;
    const isNew = scene.surface !== this.#scene.surface || !this.#mesh;
    this.#scene = scene;
    if (!gl) return;
    if (isNew) {
      for (const buffer of this.#mesh?.buffers ?? []) gl.deleteBuffer(buffer);
      this.#mesh = null;
      if (scene.surface) {
        const { positions, normals, indices } = scene.surface;
        const buffers = [
          fillBuffer(gl, gl.ARRAY_BUFFER, positions),
          fillBuffer(gl, gl.ARRAY_BUFFER, normals),
          fillBuffer(gl, gl.ELEMENT_ARRAY_BUFFER, indices),
        ];
        this.#mesh = { buffers, count: indices.length };
      }
    }
    this.paint();
  }

  paint() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    const [gl, program] = [this.#gl, this.#program];
    if (!gl || !program) return;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [this.#canvas.clientWidth, this.#canvas.clientHeight].map((length) => Math.max(1, Math.round(length * ratio)));
    if (this.#canvas.width !== width || this.#canvas.height !== height) Object.assign(this.#canvas, { width, height });
    gl.viewport(0, 0, width, height);
    gl.clearColor(GROUND[0], GROUND[1], GROUND[2], 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.useProgram(program);
    gl.enable(gl.DEPTH_TEST);
    gl.uniformMatrix4fv(gl.getUniformLocation(program, "view"), false, makeView(this.#scene.size, this.#turn, width / height));
    const color = gl.getUniformLocation(program, "color");
    if (this.#mesh) {
      const [red, green, blue] = parseColor(this.#scene.color).map((value) => value / 255);
      gl.uniform4f(color, red, green, blue, 1);
      this.#mesh.buffers.slice(0, 2).forEach((buffer, place) => {
        gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
        gl.enableVertexAttribArray(place);
        gl.vertexAttribPointer(place, 3, gl.FLOAT, false, 0, 0);
      });
      gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.#mesh.buffers[2]);
      gl.drawElements(gl.TRIANGLES, this.#mesh.count, gl.UNSIGNED_INT, 0);
    }
    if (this.#scene.level !== null) this.#drawLevel(gl, color, this.#scene.level);
  }

  /**
   * A frame where the slice that is shown runs through.
   * @param {WebGL2RenderingContext} gl
   * @param {WebGLUniformLocation|null} color
   * @param {number} level
   */
  #drawLevel(gl, color, level) {
    const [x, y] = this.#scene.size;
    const buffer = fillBuffer(gl, gl.ARRAY_BUFFER, Float32Array.of(0, 0, level, x, 0, level, x, y, level, 0, y, level));
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 3, gl.FLOAT, false, 0, 0);
    gl.disableVertexAttribArray(1);
    gl.vertexAttrib3f(1, 0, 0, 1);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.uniform4f(color, PLANE_COLOR[0], PLANE_COLOR[1], PLANE_COLOR[2], PLANE_COLOR[3]);
    gl.drawArrays(gl.LINE_LOOP, 0, 4);
    gl.disable(gl.BLEND);
    gl.deleteBuffer(buffer);
  }
}

/**
 * @param {WebGL2RenderingContext} gl
 * @param {number} target
 * @param {Float32Array|Uint32Array} content
 */
function fillBuffer(gl, target, content) {
  const buffer = gl.createBuffer();
  gl.bindBuffer(target, buffer);
  gl.bufferData(target, content, gl.STATIC_DRAW);
  return buffer;
}

/**
 * From mm (x to the patient's left, y to the back, z to the head) to the screen, without perspective: lengths can be compared.
 * @param {readonly [x: number, y: number, z: number]} size
 * @param {{around: number, up: number}} turn
 * @param {number} aspect
 * @returns {Float32Array} column by column
 */
function makeView(size, { around, up }, aspect) {
  const scale = 2 / Math.hypot(...size);
  const [wide, high] = aspect >= 1 ? [scale / aspect, scale] : [scale, scale * aspect];
  const [cosA, sinA, cosU, sinU] = [Math.cos(around), Math.sin(around), Math.cos(up), Math.sin(up)];
  // At no turn x runs to the right, z up, and y away from who looks: the patient is seen from in front.
  const right = [cosA, sinA, 0];
  const above = [sinA * sinU, -cosA * sinU, cosU];
  const away = [-sinA * cosU, cosA * cosU, sinU];
  const rows = [right.map((value) => value * wide), above.map((value) => value * high), away.map((value) => value * scale * 0.5)];
  const shift = rows.map((row) => -row.reduce((sum, value, axis) => sum + (value * size[axis]) / 2, 0));
  return Float32Array.of(rows[0][0], rows[1][0], rows[2][0], 0, rows[0][1], rows[1][1], rows[2][1], 0, rows[0][2], rows[1][2], rows[2][2], 0, shift[0], shift[1], shift[2], 1);
}
