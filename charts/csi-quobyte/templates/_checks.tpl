{{/* What values.schema.json cannot say. Included by the controller's template, before anything is rendered. */}}
{{- define "csi-quobyte.checks" -}}
{{- $names := list }}
{{- $paths := list }}
{{- range .Values.pools }}
{{- if has .name $names }}
{{- fail (printf "pools: the name %s comes twice" .name) }}
{{- end }}
{{- $path := printf "%s/%s" (clean .hostPath) (default "" .subPath) | clean }}
{{- if has $path $paths }}
{{- fail (printf "pools: %s is given twice" $path) }}
{{- end }}
{{- $names = append $names .name }}
{{- $paths = append $paths $path }}
{{- end }}
{{- range .Values.storageClasses }}
{{- $pool := dig "parameters" "pool" "" . }}
{{- if and $pool (not (has $pool $names)) }}
{{- fail (printf "storageClasses: %s names the pool %s; pools: %s" .name $pool (join ", " $names)) }}
{{- end }}
{{- if and (not $pool) (gt (len $names) 1) }}
{{- fail (printf "storageClasses: %s must have the parameter pool, because there are several: %s" .name (join ", " $names)) }}
{{- end }}
{{- end }}
{{- if and .Values.metrics.enabled (eq (int .Values.metrics.port) (int .Values.healthPort)) }}
{{- fail (printf "metrics.port and healthPort are both %d" (int .Values.healthPort)) }}
{{- end }}
{{/* An address of a unix socket has at most 107 bytes. */}}
{{- range list (printf "%s/plugins/%s/csi.sock" .Values.kubeletDir .Values.driverName) (printf "%s/plugins_registry/%s-reg.sock" .Values.kubeletDir .Values.driverName) }}
{{- if gt (len .) 107 }}
{{- fail (printf "kubeletDir and driverName are too long together: the socket %s has %d bytes, at most 107 are possible" . (len .)) }}
{{- end }}
{{- end }}
{{- end }}
